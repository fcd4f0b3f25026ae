"""Evaluates a run's models for its report: accuracy per class, images that the student lost, and token maps."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

from sit_jax.analysis.summary import trained_teacher
from sit_jax.config import Config
from sit_jax.data.config import DataConfig
from sit_jax.data.pipeline import Hosts, check_classes, eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source
from sit_jax.errors import ImageDecodeError, NotFiniteError
from sit_jax.io.load import load_run
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Variables
from sit_jax.report.load_run import RunInfo, attempt
from sit_jax.training.progress import Progress
from sit_jax.visual.model_input import ModelInput, preprocess
from sit_jax.visual.token_maps import TokenMaps, model_token_maps


class Verdict(NamedTuple):
    """Prediction of a model for one image.

    Attributes:
        name: The most likely class.
        probability: Its probability.
        right: Whether it is the image's class; different classes may have the same name.
    """

    name: str
    probability: float
    right: bool


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of the evaluation split.

    Attributes:
        index: Index of the image in the split.
        file: Its file or record.
        label: Name of its class.
        verdicts: Prediction of each model, by `student` and `teacher`.
        pixels: The image in display size, uint8 (side, side, channels).
    """

    index: int
    file: str
    label: str
    verdicts: dict[str, Verdict]
    pixels: UInt8[ndarray, "side side channels"]


class ClassScore(NamedTuple):
    """Accuracy of one class.

    Attributes:
        name: Name of the class.
        pictures: Number of images.
        student: Fraction that the student classifies correctly.
        teacher: Fraction that the teacher classifies correctly; None without a teacher.
    """

    name: str
    pictures: int
    student: float
    teacher: float | None

    @property
    def change(self) -> float:
        """The student's fraction minus the teacher's."""
        return self.student - (self.student if self.teacher is None else self.teacher)


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """Evaluation of the newest checkpoint of a run on its evaluation split.

    Attributes:
        classes: All classes with images, in the data's order.
        outcomes: Number of images by (student correct, teacher correct); empty without a teacher.
        lost: Images that only the teacher classifies correctly, the most confident mistakes first.
        examples: Images from the whole split, in the order of the batch of `maps`.
        maps: The student's token maps of the examples; None for a model without slimming.
    """

    classes: list[ClassScore]
    outcomes: dict[tuple[bool, bool], int]
    lost: list[Picture]
    examples: list[Picture]
    maps: TokenMaps | None

    @property
    def pictures(self) -> int:
        """Number of evaluated images."""
        return sum(score.pictures for score in self.classes)


@dataclasses.dataclass(frozen=True)
class _Answers:
    """The labels of a split and the predictions of each model, in the split's order; label -1 for a skipped image."""

    labels: Int[ndarray, " pictures"]
    classes: dict[str, Int[ndarray, " pictures"]]
    probabilities: dict[str, Float[ndarray, " pictures"]]

    def right(self, model: str) -> ndarray:
        return (self.classes[model] == self.labels) & (self.labels >= 0)


def find(record: RunInfo, examples: int) -> EvalReport:
    """Evaluates a run's student and its teacher on the evaluation split, with progress output.

    Args:
        record: The run. Problems of the teacher alone are added to its `missing`.
        examples: Largest number of images of each kind.

    Raises:
        UserError: The student has no complete checkpoint, or the data is not available.
    """
    student = load_run(record.folder)
    config = student.config
    assert config is not None
    models = {"student": student}
    teacher = attempt(lambda: trained_teacher(student, record.folder), None, record.missing, "The teacher")
    if teacher is not None:
        models["teacher"] = teacher
    source = open_source(config.data, config.data.eval_split)
    check_classes(config.inputs, source)
    answers = _ask(record.name, models, config, source)
    arch = student.arch if isinstance(student.arch, Architecture) else None  # Other models have no tokens.
    chosen = np.unique(np.linspace(0, len(source) - 1, min(examples, len(source))).round().astype(int))
    shown, seen = _pictures(source, arch, config.data, answers, [int(index) for index in chosen])
    slimmed = arch is not None and arch.is_slimmed and seen
    maps = model_token_maps(student, np.stack([image.pixels for image in seen])) if slimmed else None
    lost, _ = _pictures(source, arch, config.data, answers, _lost(answers)[:examples])
    return EvalReport(_per_class(answers, source.class_names), _outcomes(answers), lost, shown, maps)


def _ask(name: str, models: dict[str, Model], config: Config, source: Source) -> _Answers:
    steps = {part: _step(model) for part, model in models.items()}
    labels: list[ndarray] = []
    found: dict[str, list[tuple[ndarray, ndarray]]] = {part: [] for part in models}
    size = config.eval_batch_size
    total = -(-len(source) // size)
    with Progress(f"report: pictures of {name}", total, 0, size) as progress:
        for done, batch in enumerate(eval_batches(config.inputs, source, Hosts()), start=1):
            labels.append(np.where(batch["mask"] > 0, batch["label"], -1))
            for part, step in steps.items():
                found[part].append(jax.device_get(step(batch["image"])))
                if not np.isfinite(found[part][-1][1]).all():
                    raise NotFiniteError(f"the {part}'s outputs are not finite, so they say nothing about the images")
            progress.update(done, {})
    columns = {part: [np.concatenate(x)[: len(source)] for x in zip(*found[part], strict=True)] for part in models}
    return _Answers(
        np.concatenate(labels)[: len(source)],
        {part: classes for part, (classes, _) in columns.items()},
        {part: probabilities for part, (_, probabilities) in columns.items()},
    )


def _step(model: Model) -> Callable[[ndarray], tuple[jax.Array, jax.Array]]:
    """Returns a jitted map from uint8 pixels to the top-1 class and its probability."""

    @jax.jit
    def step(variables: Variables, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        probabilities = jax.nn.softmax(model.module.apply(variables, normalize(pixels, model.data))[0])
        return probabilities.argmax(axis=1), probabilities.max(axis=1)

    placed = jax.device_put(model.variables)
    return lambda pixels: step(placed, jnp.asarray(pixels))


def _per_class(answers: _Answers, names: Any) -> list[ClassScore]:
    kept = answers.labels >= 0
    counts = np.bincount(answers.labels[kept], minlength=len(names))
    right = {
        part: np.bincount(answers.labels[answers.right(part)], minlength=len(names)) / np.maximum(1, counts)
        for part in answers.classes
    }
    return [
        ClassScore(
            str(name),
            int(counts[index]),
            float(right["student"][index]),
            float(right["teacher"][index]) if "teacher" in right else None,
        )
        for index, name in enumerate(names)
        if counts[index]
    ]


def _outcomes(answers: _Answers) -> dict[tuple[bool, bool], int]:
    if "teacher" not in answers.classes:
        return {}
    kept, student, teacher = answers.labels >= 0, answers.right("student"), answers.right("teacher")
    return {
        (mine, theirs): int((kept & (student == mine) & (teacher == theirs)).sum())
        for mine in (True, False)
        for theirs in (True, False)
    }


def _lost(answers: _Answers) -> list[int]:
    """Returns the indices of the images that only the teacher classifies correctly, most confident mistakes first."""
    if "teacher" not in answers.classes:
        return []
    lost = np.flatnonzero(answers.right("teacher") & ~answers.right("student"))
    order = np.argsort(-answers.probabilities["student"][lost], kind="stable")
    return [int(index) for index in lost[order]]


def _pictures(
    source: Source, arch: Architecture | None, data: DataConfig, answers: _Answers, places: list[int]
) -> tuple[list[Picture], list[ModelInput]]:
    """Returns the images at these indices of the split, and their model inputs; unreadable ones are skipped."""
    pictures, seen = [], []
    for index in places:
        if arch is None or answers.labels[index] < 0:
            continue
        try:
            example = source[index]
            view = preprocess(arch, data, example)
        except ImageDecodeError:
            continue
        names = source.class_names
        verdicts = {
            part: Verdict(
                str(names[int(answers.classes[part][index])]),
                float(answers.probabilities[part][index]),
                bool(answers.right(part)[index]),
            )
            for part in answers.classes
        }
        pictures.append(Picture(index, example.name, str(names[example.label]), verdicts, view.shown))
        seen.append(view)
    return pictures, seen
