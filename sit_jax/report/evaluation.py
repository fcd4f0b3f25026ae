"""Evaluates a run's models for its report: accuracy per class, images that the student lost, and token maps."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

from sit_jax.analysis.summary import trained_teacher
from sit_jax.config import Config
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
    """A model's most likely class for an image, and whether it is the image's; classes may have the same name."""

    name: str
    probability: float
    right: bool


@dataclasses.dataclass(frozen=True)
class EvalImage:
    """An image of the evaluation split in display size, with the predictions of the `student` and the `teacher`.

    `file` is the image's file or record, `label` the name of its class.
    """

    index: int
    file: str
    label: str
    verdicts: dict[str, Verdict]
    pixels: UInt8[ndarray, "side side channels"]


class ClassScore(NamedTuple):
    """Number of images of a class, and the fractions of them that the student and the teacher, if any, have right."""

    name: str
    images: int
    student: float
    teacher: float | None

    @property
    def change(self) -> float:
        """The student's fraction minus the teacher's."""
        return self.student - (self.student if self.teacher is None else self.teacher)


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """Evaluation of the newest checkpoint of a run on its evaluation split.

    `classes` are those with images, in the data's order; `outcomes` is the number of images by (student correct,
    teacher correct), empty without a teacher; `lost` are images that only the teacher classifies correctly, the most
    confident mistakes first; `examples` are from the whole split, and `maps` the student's token maps of them, None for
    a model without slimming.
    """

    classes: list[ClassScore]
    outcomes: dict[tuple[bool, bool], int]
    lost: list[EvalImage]
    examples: list[EvalImage]
    maps: TokenMaps | None

    @property
    def images(self) -> int:
        """Number of evaluated images."""
        return sum(score.images for score in self.classes)


class _Predictions(NamedTuple):
    """Labels of a split, -1 for skipped images, and each model's top-1 classes with their probabilities."""

    labels: Int[ndarray, " images"]
    classes: dict[str, Int[ndarray, " images"]]
    probabilities: dict[str, Float[ndarray, " images"]]

    def right(self, model: str) -> ndarray:
        return (self.classes[model] == self.labels) & (self.labels >= 0)


def evaluate(run: RunInfo, examples: int) -> EvalReport:
    """Evaluates a run's student and its teacher on the evaluation split, with up to `examples` images of each kind.

    Problems of the teacher alone are added to `run.missing`. Raises a UserError if the student has no complete
    checkpoint, or the data is not available.
    """
    student = load_run(run.folder)
    config, models = student.config, {"student": student}
    assert config is not None
    teacher = attempt(lambda: trained_teacher(student, run.folder), None, run.missing, "The teacher")
    if teacher is not None:
        models["teacher"] = teacher
    source = open_source(config.data, config.data.eval_split)
    check_classes(config.inputs, source)
    predictions = _predict(run.name, models, config, source)
    classes, outcomes = _per_class(predictions, source.class_names), _outcomes(predictions)
    if not isinstance(student.arch, Architecture):  # A model without tokens.
        return EvalReport(classes, outcomes, [], [], None)
    spread = np.linspace(0, len(source) - 1, min(examples, len(source))).round().astype(int)
    shown, inputs = _load(source, student, predictions, np.unique(spread))
    slimmed = student.arch.is_slimmed and inputs
    maps = model_token_maps(student, np.stack([x.pixels for x in inputs])) if slimmed else None
    lost, _ = _load(source, student, predictions, _lost(predictions)[:examples])
    return EvalReport(classes, outcomes, lost, shown, maps)


def _predict(name: str, models: dict[str, Model], config: Config, source: Source) -> _Predictions:
    steps = {part: _step(model) for part, model in models.items()}
    labels: list[ndarray] = []
    found: dict[str, list[tuple[ndarray, ndarray]]] = {part: [] for part in models}
    count, size = len(source), config.eval_batch_size
    with Progress(f"report: images of {name}", -(-count // size), 0, size) as progress:
        for done, batch in enumerate(eval_batches(config.inputs, source, Hosts()), start=1):
            labels.append(np.where(batch["mask"] > 0, batch["label"], -1))
            for part, step in steps.items():
                top1, probability = jax.device_get(step(batch["image"]))
                if not np.isfinite(probability).all():
                    raise NotFiniteError(f"the {part}'s outputs are not finite, so they say nothing about the images")
                found[part].append((top1, probability))
            progress.update(done, {})
    columns = {part: [np.concatenate(x)[:count] for x in zip(*found[part], strict=True)] for part in models}
    classes, probabilities = ({part: columns[part][index] for part in models} for index in (0, 1))
    return _Predictions(np.concatenate(labels)[:count], classes, probabilities)


def _step(model: Model) -> Callable[[ndarray], tuple[jax.Array, jax.Array]]:
    """Returns a jitted map from uint8 pixels to the top-1 class and its probability."""

    @jax.jit
    def step(variables: Variables, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        probabilities = jax.nn.softmax(model.module.apply(variables, normalize(pixels, model.data))[0])
        return probabilities.argmax(axis=1), probabilities.max(axis=1)

    placed = jax.device_put(model.variables)
    return lambda pixels: step(placed, jnp.asarray(pixels))


def _per_class(predictions: _Predictions, names: Sequence[str]) -> list[ClassScore]:
    def count(images: ndarray) -> ndarray:
        return np.bincount(predictions.labels[images], minlength=len(names))

    counts = count(predictions.labels >= 0)
    right = {model: count(predictions.right(model)) / np.maximum(1, counts) for model in predictions.classes}
    students = right["student"].tolist()
    teachers = right["teacher"].tolist() if "teacher" in right else [None] * len(names)
    rows = zip(names, counts.tolist(), students, teachers, strict=True)
    return [ClassScore(str(name), images, student, teacher) for name, images, student, teacher in rows if images]


def _outcomes(predictions: _Predictions) -> dict[tuple[bool, bool], int]:
    if "teacher" not in predictions.classes:
        return {}
    read, student, teacher = predictions.labels >= 0, predictions.right("student"), predictions.right("teacher")
    pairs = [(mine, theirs) for mine in (True, False) for theirs in (True, False)]
    return {(mine, theirs): int((read & (student == mine) & (teacher == theirs)).sum()) for mine, theirs in pairs}


def _lost(predictions: _Predictions) -> Int[ndarray, " lost"]:
    """Returns the indices of the images that only the teacher classifies correctly, most confident mistakes first."""
    if "teacher" not in predictions.classes:
        return np.zeros(0, int)
    lost = np.flatnonzero(predictions.right("teacher") & ~predictions.right("student"))
    return lost[np.argsort(-predictions.probabilities["student"][lost], kind="stable")]


def _load(
    source: Source, student: Model, predictions: _Predictions, indices: Int[ndarray, " chosen"]
) -> tuple[list[EvalImage], list[ModelInput]]:
    """Returns the images at these indices of the split, and their model inputs; unreadable ones are skipped."""
    images, inputs, names = [], [], source.class_names
    for index in indices[predictions.labels[indices] >= 0].tolist():
        try:
            example = source[index]
            inputs.append(preprocess(student.vit, student.data, example))
        except ImageDecodeError:
            continue
        verdicts = {
            model: Verdict(
                str(names[classes[index]]),
                float(predictions.probabilities[model][index]),
                bool(predictions.right(model)[index]),
            )
            for model, classes in predictions.classes.items()
        }
        images.append(EvalImage(index, example.name, str(names[example.label]), verdicts, inputs[-1].shown))
    return images, inputs
