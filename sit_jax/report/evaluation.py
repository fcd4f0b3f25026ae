"""Evaluates a run's models for its report: accuracy per class or similar images, lost images, and token maps."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from sit_jax.analysis.summary import trained_teacher
from sit_jax.config import Config
from sit_jax.data.pipeline import Hosts, check_classes, eval_batches
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source, evenly_spread
from sit_jax.errors import ImageDecodeError, NotFiniteError
from sit_jax.io.inference import softmax
from sit_jax.io.load import load_run
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
from sit_jax.report.load_run import RunInfo, attempt
from sit_jax.training.evaluate import model_features
from sit_jax.training.metrics import other_neighbours, unit_vectors
from sit_jax.training.progress import Progress
from sit_jax.visual.model_input import ModelInput, preprocess
from sit_jax.visual.token_maps import TokenMaps, model_token_maps

# Neighbours of each image that are shown.
_NEIGHBOURS = 4


class Verdict(NamedTuple):
    """A model's most likely class for an image, and whether it is the image's; classes may have the same name."""

    name: str
    probability: float
    right: bool


@dataclasses.dataclass(frozen=True)
class EvalImage:
    """An image of the evaluation split in display size, with the predictions of the `student` and the `teacher`.

    `file` is the image's file or record, `label` the name of its class; without labels, the name of the file, and there
    are no predictions.
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


class Neighbour(NamedTuple):
    """An image of the evaluation split that is similar to another one.

    `cosine` is the cosine similarity of their features. The image is `shared` if it is also a neighbour by the other
    model's features.
    """

    image: EvalImage
    cosine: float
    shared: bool


class SimilarImages(NamedTuple):
    """An image, and its nearest neighbours by the features of the `student` and the `teacher`, the nearest first."""

    image: EvalImage
    neighbours: dict[str, list[Neighbour]]


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """Evaluation of the newest checkpoint of a run on its evaluation split.

    `classes` are those with images, in the data's order; `outcomes` is the number of images by (student correct,
    teacher correct), empty without a teacher; `lost` are images that only the teacher classifies correctly, the most
    confident mistakes first; `examples` are from the whole split, and `maps` the student's token maps of them, None for
    a model without slimming. A run without labels has `similar` instead of classes, outcomes and lost images.
    """

    classes: list[ClassScore]
    outcomes: collections.Counter[tuple[bool, bool]]
    lost: list[EvalImage]
    examples: list[EvalImage]
    maps: TokenMaps | None
    similar: list[SimilarImages] = dataclasses.field(default_factory=list)


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
    if not config.loss.uses_labels:
        return _compare(models, config, source, examples)
    check_classes(config.inputs, source)
    labels, top1 = _predict(run.name, models, config, source)
    classes, outcomes = _per_class(labels, top1, source.class_names), _outcomes(labels, top1)
    if not isinstance(student.arch, Architecture):  # A model without tokens.
        return EvalReport(classes, outcomes, [], [], None)
    spread, lost = evenly_spread(len(source), examples), _lost(top1)[:examples]
    shown, maps = _with_maps(student, _load(source, student, top1, spread[labels[spread] >= 0]))
    lost_images = [image for image, _ in _load(source, student, top1, lost)]
    return EvalReport(classes, outcomes, lost_images, shown, maps)


def _compare(models: dict[str, Model], config: Config, source: Source, examples: int) -> EvalReport:
    """Returns the report of a run without labels: which images are similar by the features of each model."""
    student, split = models["student"], config.data.eval_split
    features = {name: model_features(model, config.data, split) for name, model in models.items()}
    readable = np.flatnonzero(np.all([x.valid for x in features.values()], axis=0))
    vectors = {name: unit_vectors(x.values[readable]) for name, x in features.items()}
    for name, x in vectors.items():
        if not np.isfinite(x).all():
            raise NotFiniteError(f"the features of the {name} are not finite")
    rows = evenly_spread(len(readable), examples)
    shown, maps = _with_maps(student, _load(source, student, {}, readable[rows]))
    k = min(_NEIGHBOURS, len(readable) - 1)
    if k < 1:
        return EvalReport([], collections.Counter(), [], shown, maps)
    nearest = {name: other_neighbours(x, k, rows) for name, x in vectors.items()}
    used = np.unique(np.concatenate([rows, *(x.ravel() for x in nearest.values())]))
    images = {image.index: image for image, _ in _load(source, student, {}, readable[used])}
    similar = []
    for query, *found in zip(rows, *nearest.values(), strict=True):
        by_model = dict(zip(nearest, found, strict=True))
        shared = set.intersection(*(set(x.tolist()) for x in found)) if len(found) > 1 else set()
        neighbours = {
            name: [
                Neighbour(images[int(readable[i])], float(vectors[name][query] @ vectors[name][i]), int(i) in shared)
                for i in indices
            ]
            for name, indices in by_model.items()
        }
        similar.append(SimilarImages(images[int(readable[query])], neighbours))
    return EvalReport([], collections.Counter(), [], shown, maps, similar)


def _with_maps(
    student: Model, loaded: Sequence[tuple[EvalImage, ModelInput]]
) -> tuple[list[EvalImage], TokenMaps | None]:
    """Returns the images, and their token maps if the student is slimmed."""
    pixels = [inputs.pixels for _, inputs in loaded]
    maps = model_token_maps(student, np.stack(pixels)) if student.vit.is_slimmed and pixels else None
    return [image for image, _ in loaded], maps


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
    source: Source, student: Model, top1: dict[str, _Top1], indices: Int[ndarray, " chosen"]
) -> list[tuple[EvalImage, ModelInput]]:
    """Returns the images at these indices of the split, with their model inputs; unreadable ones are skipped."""
    loaded, names = [], source.class_names
    for index in indices.tolist():
        try:
            example = source[index]
            inputs = preprocess(student.vit, student.data, example)
        except ImageDecodeError:
            continue
        verdicts = {
            model: Verdict(str(names[x.classes[index]]), float(x.probabilities[index]), bool(x.right[index]))
            for model, x in top1.items()
        }
        label = str(names[example.label]) if top1 else pathlib.PurePath(example.name).name
        loaded.append((EvalImage(index, example.name, label, verdicts, inputs.shown), inputs))
    return loaded
