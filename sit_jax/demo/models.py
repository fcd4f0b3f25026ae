"""Models of the demo: opened once, applied to single images, and timed in turns."""

import collections
import dataclasses
import functools
import pathlib
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from sit_jax.analysis.summary import trained_teacher
from sit_jax.data.sources import Example
from sit_jax.demo.similar import Gallery, open_gallery
from sit_jax.errors import NotFiniteError, UserError
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
from sit_jax.models.cut import can_cut, scaled_schedule
from sit_jax.training.metrics import nearest_neighbours, unit_vectors
from sit_jax.visual.model_input import ModelInput, preprocess
from sit_jax.visual.token_maps import TokenMaps, model_token_maps

# Images with more pixels are not decoded, independent of the models' configurations, since the page takes any file.
MAX_PIXELS = 40_000_000
_ROUNDS, _SECONDS = 9, 2.0
_BATCH = 16
# Selectable factors of the keep ratio.
_FACTORS = (0.8, 0.6, 0.4)


Counts = tuple[int, ...]


def keeps(arch: Architecture, fewer: bool = True) -> dict[str, Counts]:
    """Returns label -> tokens that each reducer keeps: as trained, then, if `fewer`, for smaller keep ratios."""
    found = {counts[1:]: "as trained" for counts in arch.kept_tokens_choices or (arch.token_counts,)}
    for factor in _FACTORS if fewer and not arch.kept_tokens_choices else ():
        given = arch.keep_ratio if not arch.kept_tokens else None
        ratio = f"keep ratio {given * factor:.2g}" if given else f"{factor:.0%} per module"
        found.setdefault(scaled_schedule(arch.token_counts, factor)[1:], ratio)
    return {f"{label}: {tokens_in_words(counts)}": counts for counts, label in found.items()}


def tokens_in_words(counts: Counts) -> str:
    """Formats token counts: `(8, 4)` -> `8/4 tokens`, `(1,)` -> `1 token`."""
    return f"{'/'.join(map(str, counts))} {'token' if counts == (1,) else 'tokens'}"


class DemoModel:
    """A model of the page.

    `keeps` are the selectable token counts of its reducers, the trained ones first, and empty without reducers.
    `labels` are its class names; duplicates have their index appended. With a `gallery`, the model shows the most
    similar of its images instead of classes.
    """

    def __init__(self, model: Model, gallery: Gallery | None = None) -> None:
        self.model, self.gallery = model, gallery
        self.keeps = keeps(model.vit, can_cut(model.vit, model.params)) if model.vit.is_slimmed else {}
        times = collections.Counter(model.class_names)
        self.labels = [f"{x} ({n})" if times[x] > 1 else x for n, x in enumerate(model.class_names)]

    def preprocess(self, example: Example) -> ModelInput:
        """Preprocesses an image; raises an ImageDecodeError if it cannot be read, or has too many pixels."""
        data = self.model.data
        limited = dataclasses.replace(data, max_pixels=min(data.max_pixels, MAX_PIXELS))
        return preprocess(self.model.vit, limited, example)

    def maps(self, seen: ModelInput, counts: Counts | None) -> TokenMaps:
        """Returns the token maps of one image."""
        return model_token_maps(self._with(counts), seen.pixels[None])

    def forward(self, seen: ModelInput, counts: Counts | None) -> Callable[[], object]:
        """Returns a function that runs the forward pass on one image, from pixels to what a call returns."""
        model, pixels = self._with(counts), seen.pixels[None]
        return lambda: jax.block_until_ready(model(pixels))

    def most_likely(self, maps: TokenMaps, top: int = 5) -> dict[str, float]:
        """Returns label -> probability of the top classes, most likely first."""
        values = maps.probabilities[0]
        return {self.labels[index]: float(values[index]) for index in np.argsort(-values, kind="stable")[:top]}

    def most_similar(self, seen: ModelInput, counts: Counts | None, top: int = 6) -> list[tuple[ndarray, str]]:
        """Returns the images of the gallery with the most similar features, with the cosine similarity as caption.

        Raises a NotFiniteError if features are not finite.
        """
        gallery, keys = self.gallery, self.gallery_vectors(counts)
        assert gallery is not None
        query = self._vectors(seen.pixels[None], counts)
        nearest = nearest_neighbours(query, keys, min(top, len(keys)))[0]
        return [(gallery.small[index], f"{query[0] @ keys[index]:.4f}") for index in nearest.tolist()]

    @functools.cache  # noqa: B019 - models live as long as the page
    def gallery_vectors(self, counts: Counts | None) -> Float[ndarray, "images features"]:
        """Returns the features of the images of the gallery, scaled to length 1."""
        assert self.gallery is not None
        pixels = np.stack([self.preprocess(example).pixels for example in self.gallery.examples])
        # The last batch is padded, so that it needs no compilation.
        padded = np.pad(pixels, ((0, -len(pixels) % _BATCH), (0, 0), (0, 0), (0, 0)))
        parts = [self._vectors(padded[i : i + _BATCH], counts) for i in range(0, len(padded), _BATCH)]
        return np.concatenate(parts)[: len(pixels)]

    def _vectors(self, pixels: UInt8[ndarray, "batch height width channels"], counts: Counts | None) -> ndarray:
        features = np.asarray(self._with(counts).features(pixels).pooled)
        if not np.isfinite(features).all():
            raise NotFiniteError(f"{self.model.source}: the features are not finite, so they say nothing about images")
        return unit_vectors(features)

    @functools.cache  # noqa: B019 - models live as long as the page
    def _with(self, counts: Counts | None) -> Model:
        if counts is None or counts == self.model.vit.token_counts[1:]:
            return self.model
        return self.model.cut((self.model.vit.num_patches, *counts))


class DemoModels(NamedTuple):
    """All models of a page, by folder; without heads, there may be no teacher."""

    students: dict[str, DemoModel]
    teachers: dict[str, DemoModel]


def open_demo_models(
    students: Sequence[pathlib.Path], teachers: Sequence[pathlib.Path], images: Sequence[str] = ()
) -> DemoModels:
    """Opens slimmed models and transformers to compare them with, by default the teachers of the students' runs.

    If a model has no head, all of them show similar images: of `images`, or of the first student's evaluation split.
    Raises a UserError if a model cannot be opened, a student is not slimmed, or there is no teacher or image.
    """
    opened = {str(path): load(path) for path in students}
    given = {str(path): load(path) for path in teachers} or _own_teachers(opened)
    headless = not all(model.arch.num_classes for model in (*opened.values(), *given.values()))
    if not given and not headless:
        raise UserError("--teacher: which model are the students compared with? Their folders contain no teacher")
    if images and not headless:
        raise UserError("--images: is for models without a head; these models predict classes")
    gallery = open_gallery(images, next(iter(opened.values())), MAX_PIXELS) if headless else None
    models = DemoModels(*({name: DemoModel(x, gallery) for name, x in group.items()} for group in (opened, given)))
    for name, student in models.students.items():
        if not student.keeps:
            raise UserError(f"--student: {name} is not slimmed; give it as --teacher")
    for model in (*models.students.values(), *models.teachers.values()) if gallery else ():
        model.gallery_vectors(None)  # The first image would wait for them.
    return models


def _own_teachers(students: Mapping[str, Model]) -> dict[str, Model]:
    """Returns the teachers in the students' folders, or that their runs name."""
    found = {}
    for name, student in students.items():
        own, config = pathlib.Path(name) / "teacher", student.config
        if own.is_dir():
            found[str(own)] = load(own)
        elif config is not None and config.teacher is not None and config.teacher.run:
            teacher = trained_teacher(student, pathlib.Path(name))
            assert teacher is not None
            found[teacher.source] = teacher
    return found


def milliseconds(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Returns the median time of each function, timed in turns, after a first call that compiles."""
    for run in runs:
        run()
    rounds: list[list[float]] = []
    begun = time.perf_counter()
    while not rounds or (len(rounds) < _ROUNDS and time.perf_counter() - begun < _SECONDS):
        rounds.append([1e3 * timeit.timeit(run, number=1) for run in runs])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
