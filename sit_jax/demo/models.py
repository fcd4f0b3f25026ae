"""Models of the demo: opened once, applied to single images, and timed in turns."""

import collections
import dataclasses
import functools
import pathlib
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sit_jax.data.sources import Example
from sit_jax.errors import UserError
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Params
from sit_jax.visual.model_input import ModelInput, preprocess
from sit_jax.visual.token_maps import TokenMaps, model_token_maps

# Images with more pixels are not decoded, independent of the models' configurations, since the page takes any file.
MAX_PIXELS = 40_000_000
_ROUNDS, _SECONDS = 9, 2.0
# Selectable factors of the keep ratio.
_FACTORS = (0.8, 0.6, 0.4)


Counts = tuple[int, ...]


def keeps(arch: Architecture) -> dict[str, Counts]:
    """Returns label -> tokens that each slimming module keeps: as trained, then for smaller keep ratios, at least 1."""
    trained = arch.token_counts[1:]
    found = {trained: "as trained"}
    for factor in _FACTORS:
        counts = tuple(max(1, int(count * factor ** (stage + 1))) for stage, count in enumerate(trained))
        ratio = f"keep ratio {arch.keep_ratio * factor:.2g}" if arch.keep_ratio else f"{factor:.0%} per module"
        found.setdefault(counts, ratio)
    return {f"{label}: {tokens_in_words(counts)}": counts for counts, label in found.items()}


def tokens_in_words(counts: Counts) -> str:
    """Formats token counts: `(8, 4)` -> `8/4 tokens`, `(1,)` -> `1 token`."""
    return f"{'/'.join(map(str, counts))} {'token' if counts == (1,) else 'tokens'}"


def with_fewer_tokens(arch: Architecture, params: Params, counts: Counts) -> tuple[Architecture, Params]:
    """Returns a model whose slimming modules output only the first of their tokens, at most as many as trained.

    Each kept token has its own column in the assignment, a softmax over the input tokens that is independent of the
    other columns, and no weight after a slimming module depends on the number of tokens. Thus columns can be removed,
    and for the same input the other tokens do not change. The model was not trained for this: the accuracy decreases.
    """
    fewer = dict(params)
    for block, count in zip(arch.slimming, counts, strict=True):
        module = params[f"slimming_{block}"]
        last = {name: values[..., :count] for name, values in module["fc2"].items()}
        fewer[f"slimming_{block}"] = {**module, "fc2": last}
    return dataclasses.replace(arch, keep_ratio=None, kept_tokens=(arch.num_patches, *counts)), fewer


class DemoModel:
    """A model of the page.

    `keeps` are the selectable token counts of its slimming modules, the trained ones first, and empty without such
    modules. `labels` are its class names; duplicates have their index appended.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.keeps = keeps(model.vit) if model.vit.is_slimmed and model.vit.reducer == "slim" else {}
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
        """Returns a function that runs the forward pass on one image, from pixels to logits, as in deployment."""
        model, pixels = self._with(counts), seen.pixels[None]
        return lambda: jax.block_until_ready(model(pixels))

    def most_likely(self, maps: TokenMaps, top: int = 5) -> dict[str, float]:
        """Returns label -> probability of the top classes, most likely first."""
        values = maps.probabilities[0]
        return {self.labels[index]: float(values[index]) for index in np.argsort(-values, kind="stable")[:top]}

    @functools.cache  # noqa: B019 - models live as long as the page
    def _with(self, counts: Counts | None) -> Model:
        if counts is None or counts == self.model.vit.token_counts[1:]:
            return self.model
        arch, params = with_fewer_tokens(self.model.vit, self.model.params, counts)
        return dataclasses.replace(self.model, arch=arch, variables={**self.model.variables, "params": params})


class DemoModels(NamedTuple):
    """All models of a page, by folder."""

    students: dict[str, DemoModel]
    teachers: dict[str, DemoModel]


def open_demo_models(students: Sequence[pathlib.Path], teachers: Sequence[pathlib.Path]) -> DemoModels:
    """Opens slimmed models and transformers to compare them with, by default those in the students' run directories.

    Raises a UserError if a model cannot be opened, a student is not slimmed, or there is no teacher.
    """
    teachers = teachers or [own for own in (path / "teacher" for path in students) if own.is_dir()]
    if not teachers:
        raise UserError("--teacher: which model are the students compared with? Their folders contain no teacher")
    models = DemoModels(*({str(path): DemoModel(load(path)) for path in paths} for paths in (students, teachers)))
    for name, student in models.students.items():
        if not student.keeps:
            raise UserError(f"--student: {name} has no slimming modules; give it as --teacher")
    return models


def milliseconds(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Returns the median time of each function, timed in turns, after a first call that compiles."""
    for run in runs:
        run()
    rounds: list[list[float]] = []
    begun = time.perf_counter()
    while not rounds or (len(rounds) < _ROUNDS and time.perf_counter() - begun < _SECONDS):
        rounds.append([1e3 * timeit.timeit(run, number=1) for run in runs])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
