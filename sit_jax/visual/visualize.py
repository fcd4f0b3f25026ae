"""`sit visualize`: writes figures and arrays of token maps for images."""

import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from sit_jax.data.folder import find_pictures
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Example, Source, read_picture, writing
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
_CLASSES_TOLD = 3


class Picture(NamedTuple):
    """An image to visualize.

    Attributes:
        name: Name in messages and arrays.
        title: Title of its figure.
        stem: Name of its files, without a suffix.
        load: Reads the image and the name of its class, which is empty if unknown.
    """

    name: str
    title: str
    stem: str
    load: Callable[[], tuple[Example, str]]


class Read(NamedTuple):
    """An image that was read.

    Attributes:
        picture: The image's description.
        seen: The preprocessed image.
        label: Name of its class, empty if unknown.
    """

    picture: Picture
    seen: ModelInput
    label: str


class Ways(NamedTuple):
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
    words: Sequence[str],
    ways: Ways,
    data: dict[str, str | None],
    limit: int | None = None,
    ema: bool = False,
    step: int | None = None,
) -> None:
    """Writes figures and arrays of token maps; implements `sit visualize`.

    Args:
        source: A run directory or a model folder.
        words: Files, folders, patterns, or `-`; see `find_pictures`. None for images of a split.
        ways: The output settings.
        data: `split`, `name` and `data_dir` of a data set; None for the one that the model was trained on.
        limit: Largest number of images; if None, all, or `FEW` of a split.
        ema: Use a run's moving average instead of its weights.
        step: Step of the run's checkpoint; the newest if None.

    Raises:
        UserError: The model, an image or the data set cannot be opened, or a file cannot be written.
        PartialFailureError: Some images could not be read.
    """
    if bool(words) == (data["split"] is not None):
        raise UserError("which pictures? Give files, folders or patterns, or else --split")
    if words and (data["name"] or data["data_dir"]):
        raise UserError("--name and --data_dir: tell where a --split is; pictures are given by themselves")
    found = from_files(find_pictures(words, sys.stdin)) if words else []
    model = load(source, ema=ema, step=step)
    if not model.vit.is_slimmed:
        print(f"{source}: has no token slimming; what is shown is the class token's attention", file=sys.stderr)
    pictures = found if words else from_split(model, data, FEW if limit is None else limit)
    done = visualize(model, pictures[:limit], ways)
    for place in (ways.figures, ways.arrays):
        if place is not None and done:
            print(f"Written: {place} ({done} pictures)")
    skipped = len(pictures[:limit]) - done
    if skipped:
        raise PartialFailureError(
            f"{skipped} of {len(pictures[:limit])} pictures could not be read and were skipped; the others were done"
        )


def from_files(names: Sequence[str]) -> list[Picture]:
    """Returns images from files."""
    stems = _different(pathlib.PurePath(name).stem for name in names)

    def one(name: str, stem: str) -> Picture:
        return Picture(name, pathlib.PurePath(name).name, stem, lambda: (read_picture(name), ""))

    return [one(name, stem) for name, stem in zip(names, stems, strict=True)]


def from_split(model: Model, data: dict[str, str | None], limit: int) -> list[Picture]:
    """Returns the first images of a split of a data set.

    Raises:
        UserError: The data set cannot be opened.
    """
    fields = {"name": data["name"], "eval_split": data["split"], "data_dir": data["data_dir"]}
    config = model.evaluation_data({key: value for key, value in fields.items() if value is not None})
    source = open_source(config, config.eval_split)
    stem = re.sub(r"[^\w.%-]+", "-", config.eval_split)
    return [_example(source, index, f"{stem}-{index:05d}") for index in range(min(limit, len(source)))]


def _example(source: Source, index: int, name: str) -> Picture:
    def load() -> tuple[Example, str]:
        example = source[index]
        return example, str(source.class_names[example.label]) if example.label >= 0 else ""

    return Picture(name, name, name, load)


def visualize(model: Model, pictures: Sequence[Picture], ways: Ways) -> int:
    """Writes figures and arrays, and reports unreadable images on standard error.

    Files are written atomically and replace existing ones. Memory use does not depend on the number of images, except
    for arrays in one file.

    Returns:
        Number of images that were read.

    Raises:
        UserError: A file cannot be written.
    """
    kept: list[tuple[Picture, dict[str, ndarray]]] = []
    one_file = ways.arrays is not None and ways.arrays.suffix == _NPZ
    readable = finished = 0
    with Progress("visualize", len(pictures), 0, 1) as progress:
        for batch in _read(model, pictures, ways.batch_size, progress):
            maps = model_token_maps(model, _filled([read.seen.pixels for read in batch], ways.batch_size))
            for index, read in enumerate(batch):
                if ways.figures is not None:
                    _write_figure(model, read, maps, index, ways)
                if ways.arrays is not None:
                    picture, arrays = read.picture, arrays_of(read.seen.pixels, maps, index)
                    if one_file:
                        kept.append((picture, arrays))
                    else:
                        _write_arrays(model, ways.arrays / f"{picture.stem}{_NPZ}", [(picture, arrays)])
                finished += 1
                progress.update(finished, {})
            readable += len(batch)
    if kept and ways.arrays is not None:
        _write_arrays(model, ways.arrays, kept)
    return readable


def _read(model: Model, pictures: Sequence[Picture], batch_size: int, progress: Progress) -> Iterator[list[Read]]:
    """Yields the readable images, batch by batch."""
    batch: list[Read] = []
    for picture in pictures:
        try:
            example, label = picture.load()
            batch.append(Read(picture, preprocess(model.vit, model.data, example), label))
        except ImageDecodeError as error:
            progress.note(f"skipped {error}")
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _filled(pixels: Sequence[ndarray], batch_size: int) -> ndarray:
    """Returns a padded batch, so that the last batch needs no compilation."""
    batch = np.zeros((batch_size, *pixels[0].shape), np.uint8)
    batch[: len(pixels)] = pixels
    return batch


def _write_figure(model: Model, read: Read, maps: TokenMaps, index: int, ways: Ways) -> None:
    probabilities, names = maps.probabilities[index], model.class_names
    order = np.argsort(-probabilities, kind="stable")[:_CLASSES_TOLD]
    says = "says " + ", ".join(f"{names[i]} {probabilities[i]:.1%}" for i in order)
    if read.label:
        says = f"labelled {read.label}; {says}"
    assert ways.figures is not None
    # Never the name of an image file, so that no input is replaced.
    path = ways.figures / f"{read.picture.stem}.maps.png"
    with writing(path), atomic_replace(path) as part:
        draw_maps(part, read.seen.shown, maps, index, read.picture.title, says, ways.tokens, ways.dpi)


def _write_arrays(model: Model, path: pathlib.Path, kept: Sequence[tuple[Picture, dict[str, ndarray]]]) -> None:
    with writing(path), atomic_replace(path) as part:
        write_arrays(part, [picture.name for picture, _ in kept], model.class_names, [x for _, x in kept])


def _different(stems: Iterable[str]) -> list[str]:
    """Returns the names with numbers appended to duplicates."""
    taken: dict[str, None] = {}
    for stem in stems:
        numbered = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        taken[next(name for name in numbered if name not in taken)] = None
    return list(taken)
