"""`sit predict`: predicts the top classes of images, in order, for any number of images."""

import collections
import concurrent.futures
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np

from sit_jax.data.sources import read_image
from sit_jax.data.transforms import EvalTransform
from sit_jax.errors import ImageDecodeError, check_all_read
from sit_jax.io.inference import softmax
from sit_jax.io.model import Model
from sit_jax.training.progress import Progress

Style = Literal["table", "jsonl", "csv"]
_THREADS = 4


class Prediction(NamedTuple):
    """Prediction for one image file: indices, names and probabilities of the top classes, most likely first."""

    image: str
    classes: list[int]
    names: list[str]
    probabilities: list[float]


def predict(
    model: Model, images: Sequence[str], top: int = 5, batch_size: int = 32
) -> Iterator[Prediction | ImageDecodeError]:
    """Yields predictions in the order of the images, or an error for an image that cannot be read.

    Memory is bounded as in `run_batches`. A prediction has the `top` classes, all if there are fewer.
    """
    names = model.class_names
    for name, row in run_batches(model, images, lambda pixels: softmax(model.logits(pixels)), batch_size):
        if isinstance(row, ImageDecodeError):
            yield row
            continue
        chosen = np.argsort(-row, kind="stable")[:top]
        yield Prediction(name, chosen.tolist(), [names[i] for i in chosen], row[chosen].tolist())


def run_batches(
    model: Model, images: Sequence[str], function: Callable[[np.ndarray], np.ndarray], batch_size: int
) -> Iterator[tuple[str, np.ndarray | ImageDecodeError]]:
    """Yields the row of `function` for each image in order, or an error for an image that cannot be read.

    `function` maps uint8 pixels of the model's size, (batch_size, height, width, channels), to (batch_size, ...). Files
    are read one batch ahead, which bounds the memory.
    """
    waiting: list[tuple[str, np.ndarray | ImageDecodeError]] = []
    readable = 0
    for name, pixels in _read(model, images, ahead=2 * batch_size):
        waiting.append((name, pixels))
        readable += not isinstance(pixels, ImageDecodeError)
        # Errors of a folder of unreadable files are then reported during reading.
        if readable == batch_size or len(waiting) == 4 * batch_size:
            yield from _answer(waiting, function, batch_size)
            waiting, readable = [], 0
    yield from _answer(waiting, function, batch_size)


def run_predict(
    model: Model,
    images: Sequence[str],
    top: int,
    style: Style,
    batch_size: int,
    out: TextIO,
    reader_gone: Callable[[TextIO], bool] = lambda _: False,
) -> None:
    """Writes predictions as they are computed, and reports unreadable images on standard error.

    Stops early if `reader_gone(out)` is True, because the reader has closed the pipe, as with `| head`. Raises a
    PartialFailureError if some images could not be read.
    """
    model.require_head()
    skipped = 0
    file_width, name_width = max(map(len, images), default=0), min(24, max(map(len, model.class_names)))
    if style == "csv":
        print("picture,rank,class,name,probability", file=out)
    with Progress("predict", len(images), 0, 1) as progress:
        for done, answer in enumerate(predict(model, images, top, batch_size), start=1):
            if isinstance(answer, ImageDecodeError):
                skipped += 1
                progress.note(f"skipped {answer}")
            else:
                _write(out, style, answer, file_width, name_width)
            if done % batch_size == 0 or done == len(images):
                progress.update(done, {})
                out.flush()
                if reader_gone(out):
                    return
    check_all_read(len(images) - skipped, len(images))


def _read(model: Model, images: Sequence[str], ahead: int) -> Iterator[tuple[str, np.ndarray | ImageDecodeError]]:
    """Yields the pixels of each image in order, with at most `ahead` images read in advance."""
    arch = model.arch
    transform = EvalTransform(model.data, arch.image_shape, arch.in_channels)

    def load(name: str) -> tuple[str, np.ndarray | ImageDecodeError]:
        try:
            return name, transform(read_image(name))["image"]
        except ImageDecodeError as error:
            return name, error

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        running: collections.deque[Any] = collections.deque()
        try:
            for name in images:
                running.append(pool.submit(load, name))
                if len(running) > ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _answer(
    images: list[tuple[str, np.ndarray | ImageDecodeError]],
    function: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
) -> Iterator[tuple[str, np.ndarray | ImageDecodeError]]:
    pixels = [x for _, x in images if not isinstance(x, ImageDecodeError)]
    rows: Iterator[np.ndarray] = iter(())
    if pixels:
        # The last batch is padded, so that it needs no compilation.
        batch = np.zeros((batch_size, *pixels[0].shape), np.uint8)
        batch[: len(pixels)] = pixels
        rows = iter(function(batch)[: len(pixels)])
    for name, read in images:
        yield name, read if isinstance(read, ImageDecodeError) else next(rows)


def _write(out: TextIO, style: Style, prediction: Prediction, file_width: int, name_width: int) -> None:
    """Writes a line per image (`table`), a JSON object per image (`jsonl`), or a row per image and class (`csv`)."""
    rows = list(zip(prediction.classes, prediction.names, prediction.probabilities, strict=True))
    if style == "csv":
        ranked = ((prediction.image, rank, *row[:2], f"{row[2]:.6f}") for rank, row in enumerate(rows, start=1))
        csv.writer(out, lineterminator="\n").writerows(ranked)
    elif style == "jsonl":
        predictions = [dict(zip(("class", "name", "probability"), row, strict=True)) for row in rows]
        print(json.dumps({"picture": prediction.image, "predictions": predictions}), file=out)
    else:
        cells = [f"{name:<{name_width}} {probability:>6.1%}" for _, name, probability in rows]
        print("   ".join([f"{prediction.image:<{file_width}}", *cells]).rstrip(), file=out)
