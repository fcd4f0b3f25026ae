"""`sit visualize`: writes figures and arrays of token maps for images."""

import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from sit_jax.data.folder import find_images
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Example, read_image, writing
from sit_jax.errors import ImageDecodeError, PartialFailureError, UserError
from sit_jax.io.atomic_write import atomic_replace
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.training.progress import Progress
from sit_jax.visual.arrays import arrays_of, write_arrays
from sit_jax.visual.figure import draw_maps
from sit_jax.visual.model_input import ModelInput, preprocess
from sit_jax.visual.token_maps import TokenMaps, model_token_maps

# Default folder of the figures.
FIGURES = pathlib.Path("maps")
# Default number of images of a split.
FEW = 16
_NPZ = ".npz"
_CLASSES_SHOWN = 3


class ImageFile(NamedTuple):
    """An image to visualize: a file, or an example of a data set.

    `name` is for messages and arrays, `title` for its figure, and `stem` is the name of its files, without a suffix.
    `load` reads the image and the name of its class, which is empty if unknown.
    """

    name: str
    title: str
    stem: str
    load: Callable[[], tuple[Example, str]]


class OutputSettings(NamedTuple):
    """Output settings.

    Attributes:
        figures: Folder of one figure per image; None for no figures.
        arrays: An .npz file for all images, or a folder of one file per image; None for no arrays.
        tokens: Largest number of tokens per slimming module in a figure.
        dpi: Resolution of the figures.
        batch_size: Number of images per batch.
    """

    figures: pathlib.Path | None = FIGURES
    arrays: pathlib.Path | None = None
    tokens: int = 8
    dpi: int = 150
    batch_size: int = 8


def command(
    source: pathlib.Path,
    paths: Sequence[str],
    output: OutputSettings,
    data: dict[str, str | None],
    limit: int | None = None,
    ema: bool = False,
    step: int | None = None,
) -> None:
    """Writes figures and arrays of token maps; implements `sit visualize`.

    Args:
        source: A run directory or a model folder.
        paths: Files, folders, patterns, or `-`; see `find_images`. Empty for images of a split.
        output: The output settings.
        data: `split`, `name` and `data_dir` of a data set; None for the one that the model was trained on.
        limit: Largest number of images; if None, all, or `FEW` of a split.
        ema: Use a run's moving average instead of its weights.
        step: Step of the run's checkpoint; the newest if None.

    Raises:
        UserError: The model, an image or the data set cannot be opened, or a file cannot be written.
        PartialFailureError: Some images could not be read.
    """
    if bool(paths) == (data["split"] is not None):
        raise UserError("which images? Give files, folders or patterns, or else --split")
    if paths and (data["name"] or data["data_dir"]):
        raise UserError("--name and --data_dir are for a --split, not for image files")
    files = from_files(find_images(paths, sys.stdin)) if paths else []
    model = load(source, ema=ema, step=step)
    if not model.vit.is_slimmed:
        print(f"{source}: has no token slimming; what is shown is the class token's attention", file=sys.stderr)
    images = files[:limit] if paths else from_split(model, data, FEW if limit is None else limit)
    done = visualize(model, images, output)
    for place in (output.figures, output.arrays):
        if place is not None and done:
            print(f"Written: {place} ({done} images)")
    if done < len(images):
        skipped = f"{len(images) - done} of {len(images)} images could not be read and were skipped"
        raise PartialFailureError(f"{skipped}; all others were processed")


def from_files(names: Sequence[str]) -> list[ImageFile]:
    """Returns images from files."""

    def one(name: str, stem: str) -> ImageFile:
        return ImageFile(name, pathlib.PurePath(name).name, stem, lambda: (read_image(name), ""))

    return [one(*pair) for pair in zip(names, _different(pathlib.PurePath(name).stem for name in names), strict=True)]


def from_split(model: Model, data: dict[str, str | None], limit: int) -> list[ImageFile]:
    """Returns the first images of a split of a data set.

    Raises:
        UserError: The data set cannot be opened.
    """
    fields = {"name": data["name"], "eval_split": data["split"], "data_dir": data["data_dir"]}
    config = model.evaluation_data({key: value for key, value in fields.items() if value is not None})
    source = open_source(config, config.eval_split)
    stem = re.sub(r"[^\w.%-]+", "-", config.eval_split)

    def one(index: int) -> ImageFile:
        def read() -> tuple[Example, str]:
            example = source[index]
            return example, str(source.class_names[example.label]) if example.label >= 0 else ""

        name = f"{stem}-{index:05d}"
        return ImageFile(name, name, name, read)

    return [one(index) for index in range(min(limit, len(source)))]


def visualize(model: Model, images: Sequence[ImageFile], output: OutputSettings) -> int:
    """Writes figures and arrays, and reports unreadable images on standard error.

    Files are written atomically and replace existing ones. Memory use does not depend on the number of images, except
    for arrays in one file.

    Returns:
        Number of images that were read.

    Raises:
        UserError: A file cannot be written.
    """
    collected: list[tuple[str, dict[str, ndarray]]] = []
    done = 0
    with Progress("visualize", len(images), 0, 1) as progress:
        for batch in _read(model, images, output.batch_size, progress):
            # The batch is padded, so that the last one needs no compilation.
            pixels = np.zeros((output.batch_size, *batch[0][1].pixels.shape), np.uint8)
            pixels[: len(batch)] = [inputs.pixels for _, inputs, _ in batch]
            maps = model_token_maps(model, pixels)
            for index, (image, inputs, label) in enumerate(batch):
                if output.figures is not None:
                    # Never the name of an image file, so that no input is replaced.
                    path = output.figures / f"{image.stem}.maps.png"
                    with writing(path), atomic_replace(path) as part:
                        prediction = _describe(model, maps, index, label)
                        draw_maps(part, inputs.shown, maps, index, image.title, prediction, output.tokens, output.dpi)
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


def _read(
    model: Model, images: Sequence[ImageFile], batch_size: int, progress: Progress
) -> Iterator[list[tuple[ImageFile, ModelInput, str]]]:
    """Yields the readable images with their model inputs and labels, batch by batch."""
    batch: list[tuple[ImageFile, ModelInput, str]] = []
    for image in images:
        try:
            example, label = image.load()
            batch.append((image, preprocess(model.vit, model.data, example), label))
        except ImageDecodeError as error:
            progress.note(f"skipped {error}")
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _describe(model: Model, maps: TokenMaps, index: int, label: str) -> str:
    """Returns the label of an image, if known, and the top classes."""
    probabilities, names = maps.probabilities[index], model.class_names
    top = np.argsort(-probabilities, kind="stable")[:_CLASSES_SHOWN]
    prediction = "predicted: " + ", ".join(f"{names[i]} {probabilities[i]:.1%}" for i in top)
    return f"labelled {label}; {prediction}" if label else prediction


def _write_arrays(model: Model, path: pathlib.Path, named: Sequence[tuple[str, dict[str, ndarray]]]) -> None:
    names, arrays = zip(*named, strict=True)
    with writing(path), atomic_replace(path) as part:
        write_arrays(part, names, model.class_names, arrays)


def _different(stems: Iterable[str]) -> list[str]:
    """Returns the names with numbers appended to duplicates."""
    taken: dict[str, None] = {}
    for stem in stems:
        numbered = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        taken[next(name for name in numbered if name not in taken)] = None
    return list(taken)
