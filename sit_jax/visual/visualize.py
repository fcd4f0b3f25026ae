"""`sit visualize`: writes figures and arrays of token maps for images."""

import functools
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from sit_jax.data.folder import find_images
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Example, read_image, read_lines, writing
from sit_jax.errors import ImageDecodeError, UserError, check_all_read
from sit_jax.io.atomic_write import atomic_replace
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.training.progress import Progress
from sit_jax.visual.figure import draw_maps
from sit_jax.visual.model_input import ModelInput, preprocess
from sit_jax.visual.token_maps import TokenMaps, attending_in_words, model_token_maps

# Default folder of the figures.
FIGURES = pathlib.Path("maps")
# Default number of images of a split.
FEW = 16
_NPZ = ".npz"
_CLASSES_SHOWN = 3


class ImageFile(NamedTuple):
    """An image to visualize: a file, or an example of a data set.

    `name` is for messages and arrays, and `stem` is the name of its files, without a suffix.
    `load` reads the image and the name of its class, which is empty if unknown.
    """

    name: str
    stem: str
    load: Callable[[], tuple[Example, str]]


class OutputSettings(NamedTuple):
    """What is written: the options of `sit visualize`; `figures` and `arrays` are None if they are not wanted."""

    figures: pathlib.Path | None
    arrays: pathlib.Path | None
    tokens: int
    dpi: int
    batch_size: int


def command(
    source: pathlib.Path,
    paths: Sequence[str],
    output: OutputSettings,
    data: dict[str, str | None],
    limit: int | None,
    ema: bool,
    step: int | None,
    kept_tokens: Sequence[int] = (),
) -> None:
    """Implements `sit visualize`; `data` has `split`, `name` and `data_dir` of a data set, which needs no `paths`.

    Raises a UserError if the model, an image or the data set cannot be opened, or a file cannot be written; and a
    PartialFailureError if some images could not be read.
    """
    if bool(paths) == (data["split"] is not None):
        raise UserError("which images? Give files, folders or patterns, or else --split")
    if paths and (data["name"] or data["data_dir"]):
        raise UserError("--name and --data_dir are for a --split, not for image files")
    files = _from_files(find_images(paths, read_lines(sys.stdin))) if paths else []
    model = load(source, ema=ema, step=step, kept_tokens=kept_tokens)
    if not model.vit.is_slimmed:
        shown = attending_in_words(model.vit)
        print(f"{source}: has no token slimming; what is shown is the attention of {shown}", file=sys.stderr)
    images = files[:limit] if paths else _from_split(model, data, FEW if limit is None else limit)
    done = _visualize(model, images, output)
    for place in (output.figures, output.arrays):
        if place is not None and done:
            print(f"Written: {place} ({done} images)")
    check_all_read(done, len(images))


def _from_files(names: Sequence[str]) -> list[ImageFile]:
    def read(name: str) -> tuple[Example, str]:
        return read_image(name), ""

    taken: dict[str, ImageFile] = {}
    for name in names:
        path = pathlib.PurePath(name)
        numbered = itertools.chain([path.stem], (f"{path.stem}-{number}" for number in itertools.count(2)))
        stem = next(stem for stem in numbered if stem not in taken)
        taken[stem] = ImageFile(name, stem, functools.partial(read, name))
    return list(taken.values())


def _from_split(model: Model, data: dict[str, str | None], limit: int) -> list[ImageFile]:
    """Returns the first images of a split of a data set."""
    fields = {"name": data["name"], "eval_split": data["split"], "data_dir": data["data_dir"]}
    config = model.evaluation_data({key: value for key, value in fields.items() if value is not None})
    source = open_source(config, config.eval_split)
    stem = re.sub(r"[^\w.%-]+", "-", config.eval_split)

    def read(index: int) -> tuple[Example, str]:
        example = source[index]
        return example, str(source.class_names[example.label]) if example.label >= 0 else ""

    names = [f"{stem}-{index:05d}" for index in range(min(limit, len(source)))]
    return [ImageFile(name, name, functools.partial(read, index)) for index, name in enumerate(names)]


def _visualize(model: Model, images: Sequence[ImageFile], output: OutputSettings) -> int:
    """Writes figures and arrays, reports unreadable images on standard error, and returns the number of the others.

    Files are written atomically and replace existing ones. Memory use does not depend on the number of images, except
    for arrays in one file.
    """
    collected: list[tuple[str, dict[str, ndarray]]] = []
    done = 0
    with Progress("visualize", len(images), 0, 1) as progress:
        readable = _read(model, images, progress)
        while batch := list(itertools.islice(readable, output.batch_size)):
            # The batch is padded, so that the last one needs no compilation.
            pixels = np.zeros((output.batch_size, *batch[0][1].pixels.shape), np.uint8)
            pixels[: len(batch)] = [inputs.pixels for _, inputs, _ in batch]
            maps = model_token_maps(model, pixels)
            for index, (image, inputs, label) in enumerate(batch):
                if output.figures is not None:
                    # Never the name of an image file, so that no input is replaced.
                    path = output.figures / f"{image.stem}.maps.png"
                    with writing(path), atomic_replace(path) as part:
                        title, prediction = pathlib.Path(image.name).name, _describe(model, maps, index, label)
                        draw_maps(part, inputs.shown, maps, index, title, prediction, output.tokens, output.dpi)
                if output.arrays is not None:
                    arrays = image.name, arrays_of(inputs.pixels, maps, index)
                    if output.arrays.suffix == _NPZ:
                        collected.append(arrays)
                    else:
                        _write_arrays(model, output.arrays / f"{image.stem}{_NPZ}", [arrays])
                done += 1
                progress.update(done, {})
    if collected and output.arrays is not None:
        _write_arrays(model, output.arrays, collected)
    return done


def _read(model: Model, images: Sequence[ImageFile], progress: Progress) -> Iterator[tuple[ImageFile, ModelInput, str]]:
    """Yields the readable images with their model inputs and labels."""
    for image in images:
        try:
            example, label = image.load()
            inputs = preprocess(model.vit, model.data, example)
        except ImageDecodeError as error:
            progress.note(f"skipped {error}")
        else:
            yield image, inputs, label


def _describe(model: Model, maps: TokenMaps, index: int, label: str) -> str:
    """Returns the label of an image, if known, and the top classes, if there are any."""
    probabilities, names = maps.probabilities[index], model.class_names
    top = np.argsort(-probabilities, kind="stable")[:_CLASSES_SHOWN]
    prediction = ", ".join(f"{names[i]} {probabilities[i]:.1%}" for i in top)
    parts = {"labelled ": label, "predicted: ": prediction}
    return "; ".join(f"{name}{text}" for name, text in parts.items() if text)


def _write_arrays(model: Model, path: pathlib.Path, images: Sequence[tuple[str, dict[str, ndarray]]]) -> None:
    """Writes one .npz file: the arrays of `arrays_of`, with the images as the first axis.

    The names of the images are `pictures` in the file, the class names by index are `class_names`.
    """
    names, arrays = zip(*images, strict=True)
    stacked = {key: np.stack([image[key] for image in arrays]) for key in arrays[0]}
    # Text is stored as plain arrays, so that no pickle is needed.
    stacked |= {"pictures": np.array(names), "class_names": np.array(model.class_names)}
    with writing(path), atomic_replace(path) as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **stacked)


def arrays_of(pixels: ndarray, maps: TokenMaps, index: int) -> dict[str, ndarray]:
    """Returns all arrays of one image of a batch, without the batch axis.

    `pixels` (height, width, channels) is the model's input; `logits` and `probabilities` (classes,); `class_attention`
    (blocks, patches), distributed to the patches; `token_counts` (blocks,), the patch tokens of each block. For each
    slimming module n from 1: `assignment_n` (tokens, kept); `cumulative_n` (kept, patches); `hard_n` (patches,);
    `overlooked_n` (patches,); `effective_patches_n` (kept,); `token_attention_n` (kept,). See `StageMaps`.
    """
    blocks = len(maps.attention)
    found: dict[str, ndarray] = {
        "pixels": pixels,
        "logits": maps.logits[index],
        "probabilities": maps.probabilities[index],
        "class_attention": np.stack([maps.attention_on_patches(block + 1)[index] for block in range(blocks)]),
        "token_counts": np.array([weights.shape[1] for weights in maps.attention]),
    }
    for number, stage in enumerate(maps.stages, start=1):
        names = ("assignment", "cumulative", "hard", "overlooked", "effective_patches")
        found |= {f"{name}_{number}": getattr(stage, name)[index] for name in names}
        found[f"token_attention_{number}"] = maps.token_attention(number - 1)[index]
    return found
