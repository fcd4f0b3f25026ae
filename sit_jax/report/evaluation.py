"""Evaluates a run's models for its report: accuracy per class, images that the student lost, and token maps."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from sit_jax.analysis.summary import trained_teacher
from sit_jax.config import Config
from sit_jax.data.pipeline import Hosts, check_classes, eval_batches
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source
from sit_jax.errors import ImageDecodeError
from sit_jax.io.inference import softmax
from sit_jax.io.load import load_run
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
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
    outcomes: collections.Counter[tuple[bool, bool]]
    lost: list[EvalImage]
    examples: list[EvalImage]
    maps: TokenMaps | None


class _Top1(NamedTuple):
    """A model's top-1 classes of the images of a split with their probabilities, and which are the images' own."""

    classes: Int[ndarray, " images"]
    probabilities: Float[ndarray, " images"]
    right: Bool[ndarray, " images"]


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
    labels, top1 = _predict(run.name, models, config, source)
    classes, outcomes = _per_class(labels, top1, source.class_names), _outcomes(labels, top1)
    if not isinstance(student.arch, Architecture):  # A model without tokens.
        return EvalReport(classes, outcomes, [], [], None)
    spread = np.linspace(0, len(source) - 1, min(examples, len(source))).round().astype(int)
    shown, inputs = _load(source, student, labels, top1, np.unique(spread))
    slimmed = student.arch.is_slimmed and inputs
    maps = model_token_maps(student, np.stack([x.pixels for x in inputs])) if slimmed else None
    lost, _ = _load(source, student, labels, top1, _lost(top1)[:examples])
    return EvalReport(classes, outcomes, lost, shown, maps)


def _predict(
    name: str, models: dict[str, Model], config: Config, source: Source
) -> tuple[Int[ndarray, " images"], dict[str, _Top1]]:
    """Returns the labels of a split, -1 for skipped images, and the predictions of each model."""
    batches: list[ndarray] = []
    found: dict[str, list[tuple[ndarray, ndarray]]] = {part: [] for part in models}
    count, size = len(source), config.eval_batch_size
    with Progress(f"report: images of {name}", -(-count // size), 0, size) as progress:
        for done, batch in enumerate(eval_batches(config.inputs, source, Hosts()), start=1):
            batches.append(np.where(batch["mask"] > 0, batch["label"], -1))
            for part, model in models.items():
                probabilities = softmax(model.logits(batch["image"]))
                found[part].append((probabilities.argmax(axis=1), probabilities.max(axis=1)))
            progress.update(done, {})
    labels, top1 = np.concatenate(batches)[:count], {}
    for part in models:
        classes, probabilities = (np.concatenate(x)[:count] for x in zip(*found[part], strict=True))
        top1[part] = _Top1(classes, probabilities, classes == labels)
    return labels, top1


def _per_class(labels: ndarray, top1: dict[str, _Top1], names: Sequence[str]) -> list[ClassScore]:
    def count(images: ndarray) -> ndarray:
        return np.bincount(labels[images], minlength=len(names))

    counts = count(labels >= 0)
    right = {model: (count(x.right) / np.maximum(1, counts)).tolist() for model, x in top1.items()}
    teachers = right.get("teacher", [None] * len(names))
    rows = zip(names, counts.tolist(), right["student"], teachers, strict=True)
    return [ClassScore(str(name), images, student, teacher) for name, images, student, teacher in rows if images]


def _outcomes(labels: ndarray, top1: dict[str, _Top1]) -> collections.Counter[tuple[bool, bool]]:
    if "teacher" not in top1:
        return collections.Counter()
    student, teacher = (top1[model].right[labels >= 0].tolist() for model in ("student", "teacher"))
    return collections.Counter(zip(student, teacher, strict=True))


def _lost(top1: dict[str, _Top1]) -> Int[ndarray, " lost"]:
    """Returns the indices of the images that only the teacher classifies correctly, most confident mistakes first."""
    if "teacher" not in top1:
        return np.zeros(0, int)
    lost = np.flatnonzero(top1["teacher"].right & ~top1["student"].right)
    return lost[np.argsort(-top1["student"].probabilities[lost], kind="stable")]


def _load(
    source: Source, student: Model, labels: ndarray, top1: dict[str, _Top1], indices: Int[ndarray, " chosen"]
) -> tuple[list[EvalImage], list[ModelInput]]:
    """Returns the images at these indices of the split, and their model inputs; unreadable ones are skipped."""
    images, inputs, names = [], [], source.class_names
    for index in indices[labels[indices] >= 0].tolist():
        try:
            example = source[index]
            inputs.append(preprocess(student.vit, student.data, example))
        except ImageDecodeError:
            continue
        verdicts = {
            model: Verdict(str(names[x.classes[index]]), float(x.probabilities[index]), bool(x.right[index]))
            for model, x in top1.items()
        }
        images.append(EvalImage(index, example.name, str(names[example.label]), verdicts, inputs[-1].shown))
    return images, inputs
