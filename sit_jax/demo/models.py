"""Models of the demo: opened once, applied to single images, and timed in turns."""

import collections
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sit_jax.data.preprocess import normalize
from sit_jax.data.sources import Example
from sit_jax.demo.fewer_tokens import Keep, keeps, with_fewer_tokens
from sit_jax.errors import UserError
from sit_jax.io.inference import inference_model
from sit_jax.visual.inspected_model import InspectedModel, ModelInput, open_inspected_model
from sit_jax.visual.token_maps import TokenMaps

# Images with more pixels are not decoded, independent of the models' configurations, since the page takes any file.
MAX_PIXELS = 40_000_000
_ROUNDS, _SECONDS = 9, 2.0


class DemoModel:
    """A model of the page.

    Attributes:
        name: The given folder.
        subject: The model for visualization.
        keeps: Selectable token counts of its slimming modules, the trained ones first; empty without such modules.
        labels: Its class names; duplicates have their index appended.
    """

    def __init__(self, name: str, subject: InspectedModel) -> None:
        self.name = name
        data = dataclasses.replace(subject.data, max_pixels=min(subject.data.max_pixels, MAX_PIXELS))
        self.subject = dataclasses.replace(subject, data=data)
        self.keeps = keeps(subject.arch) if subject.arch.is_slimmed and subject.arch.reducer == "slim" else ()
        times = collections.Counter(subject.class_names)
        self.labels = [f"{x} ({n})" if times[x] > 1 else x for n, x in enumerate(subject.class_names)]

    def preprocess(self, example: Example) -> ModelInput:
        """Preprocesses an image for the model.

        Raises:
            ImageDecodeError: The image cannot be read, or has too many pixels.
        """
        return self.subject.preprocess(example)

    def maps(self, seen: ModelInput, keep: Keep | None) -> TokenMaps:
        """Returns the token maps of one image."""
        return self._with(keep).maps(seen.pixels[None])

    def forward(self, seen: ModelInput, keep: Keep | None) -> Callable[[], Any]:
        """Returns a function that runs the forward pass on one image, from pixels to logits, as in deployment."""
        run, pixels = self._forward(keep), seen.pixels[None]
        return lambda: jax.block_until_ready(run(pixels))

    def likeliest(self, maps: TokenMaps, top: int = 5) -> dict[str, float]:
        """Returns label -> probability of the top classes, most likely first."""
        values = maps.probabilities[0]
        return {self.labels[index]: float(values[index]) for index in np.argsort(-values, kind="stable")[:top]}

    @functools.cache  # noqa: B019 - models live as long as the page
    def _with(self, keep: Keep | None) -> InspectedModel:
        if keep is None or keep == self.keeps[0]:
            return self.subject
        variables = self.subject.variables
        arch, params = with_fewer_tokens(self.subject.arch, variables["params"], keep.counts)
        return dataclasses.replace(self.subject, arch=arch, variables={**variables, "params": params})

    @functools.cache  # noqa: B019
    def _forward(self, keep: Keep | None) -> Any:
        subject = self._with(keep)
        model = inference_model(subject.arch, subject.variables, subject.dtype)
        return model.jit(before=lambda pixels: normalize(pixels, subject.data))


class DemoModels(NamedTuple):
    """All models of a page, by name.

    Attributes:
        students: Models with slimming modules.
        teachers: Models to compare the students with.
    """

    students: dict[str, DemoModel]
    teachers: dict[str, DemoModel]


def open_demo_models(students: Sequence[pathlib.Path], teachers: Sequence[pathlib.Path]) -> DemoModels:
    """Opens the models of a page.

    Args:
        students: Folders of runs or models, with slimming modules.
        teachers: Folders of any transformers; if empty, the teachers in the students' run directories are used.

    Raises:
        UserError: A model cannot be opened, a student is not slimmed, or there is no teacher.
    """
    teachers = teachers or [own for own in (path / "teacher" for path in students) if own.is_dir()]
    if not teachers:
        raise UserError("--teacher: which model shall the students be compared with? Their folders hold no teacher")
    contest = DemoModels(*({str(path): _open(path) for path in paths} for paths in (students, teachers)))
    for name, student in contest.students.items():
        if not student.keeps:
            raise UserError(f"--student: {name} has no slimming modules; give it as --teacher")
    return contest


def milliseconds(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Returns the median time of each function, timed in turns, after a first call that compiles."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    for turn in range(_ROUNDS):
        if turn and time.perf_counter() - begun > _SECONDS:
            break
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def _open(path: pathlib.Path) -> DemoModel:
    return DemoModel(str(path), open_inspected_model(path))
