"""Metrics: aggregation, and writing and reading of metric files."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from sit_jax import losses
from sit_jax.config import JsonObject
from sit_jax.data.sources import evenly_spread
from sit_jax.errors import NotFiniteError, RunError
from sit_jax.io.atomic_write import atomic_replace
from sit_jax.io.runs import writing

# Images among which neighbours are searched, at most, and queries at a time.
_MOST_COMPARED, _ROWS = 10_000, 1024


@flax.struct.dataclass
class EvalMetrics(clu_metrics.Collection):
    """Loss, top-1 and top-5 accuracy over all examples whose mask is 1; no top-5 with fewer than five classes."""

    loss: clu_metrics.Average.from_output("loss")
    top1: clu_metrics.Average.from_output("top1")
    top5: clu_metrics.Average.from_output("top5")

    def result(self, what: str) -> dict[str, float]:
        """Returns the averages by name, accuracies as fractions of 1, and the number of `examples`.

        Raises a RunError without examples and a NotFiniteError for such a loss; they name `what` was evaluated.
        """
        examples = float(self.top1.count)
        if examples == 0:
            raise RunError(f"{what}: no example to evaluate: no image of the split can be read and has a label")
        averages = {name: float(value) for name, value in self.compute().items() if getattr(self, name).count}
        if not all(map(math.isfinite, averages.values())):
            raise NotFiniteError(f"{what}: the loss over {examples:.0f} examples is {averages['loss']}")
        return {**averages, "examples": examples}


def eval_metrics(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> EvalMetrics:
    """Returns the metrics of one batch.

    Labels are class indices, (batch,), or indices of all correct classes, (batch, labels), padded with -1, of which the
    one with the largest logit is used. The mask, (batch,), is 0 for padding. Among equal logits, the class with the
    lower index ranks first, as with argmax. Logits with a NaN count as wrong.
    """
    rows = labels[:, None] if labels.ndim == 1 else labels
    scores = jnp.where(rows >= 0, jnp.take_along_axis(logits, rows, axis=1), -jnp.inf)
    label = jnp.take_along_axis(rows, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    _, ranked = jax.lax.top_k(logits, min(5, logits.shape[1]))
    right = (ranked[:, :, None] == rows[:, None, :]).any(axis=2) & ~jnp.isnan(logits).any(axis=1)[:, None]
    loss = losses.label_cross_entropy(logits, label)
    metrics = EvalMetrics.single_from_model_output(loss=loss, top1=right[:, 0], top5=right.any(axis=1), mask=mask)
    return metrics if logits.shape[1] >= 5 else metrics.replace(top5=clu_metrics.Average.empty())


def feature_metrics(student: np.ndarray, teacher: np.ndarray, what: str = "evaluation") -> dict[str, float]:
    """Compares the features of a student and its teacher, both (images, width), of the same images.

    Returns `cosine`, the mean cosine similarity; `agreement1` and `agreement5`, the mean fraction of the k = 1 or 5
    nearest neighbours of an image by the student's features that are also among the k nearest by the teacher's, where
    neighbours are the other images, by cosine similarity; and the number of `examples`. There is no `agreement` with
    k or fewer images. Neighbours are searched among at most 10,000 images, evenly spread.

    Raises a RunError without examples and a NotFiniteError for such features; they name `what` was evaluated.
    """
    if len(student) == 0:
        raise RunError(f"{what}: no example to evaluate: no image of the split can be read")
    if not (np.isfinite(student).all() and np.isfinite(teacher).all()):
        raise NotFiniteError(f"{what}: the features of {len(student)} examples are not finite")
    mine, theirs = unit_vectors(student), unit_vectors(teacher)
    result = {"cosine": float((mine * theirs).sum(axis=1, dtype=np.float64).mean())}
    chosen = evenly_spread(len(mine), _MOST_COMPARED)
    ks = [k for k in (1, 5) if k < len(chosen)]
    if ks:
        nearest = [other_neighbours(x[chosen], max(ks)) for x in (mine, theirs)]
        for k in ks:
            shared = nearest[0][:, :k, None] == nearest[1][:, None, :k]
            result[f"agreement{k}"] = float(shared.any(axis=2).mean())
    return {**result, "examples": float(len(student))}


def unit_vectors(features: np.ndarray) -> np.ndarray:
    """Returns rows scaled to length 1, float32; a row of zeros stays."""
    rows = features.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest_neighbours(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """Returns the indices of the k keys with the largest dot product of each query, the largest first; (queries, k)."""
    search = jax.jit(lambda part, keys: jax.lax.top_k(part @ keys.T, k)[1])
    parts = [np.asarray(search(queries[i : i + _ROWS], keys)) for i in range(0, len(queries), _ROWS)]
    return np.concatenate(parts)


def other_neighbours(vectors: np.ndarray, k: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Returns the indices of the k nearest other vectors of each vector, or of those in `rows`; k < len(vectors)."""
    rows = np.arange(len(vectors)) if rows is None else rows
    found = nearest_neighbours(vectors[rows], vectors, k + 1)
    # The vector itself is not always the first, as there may be equal ones.
    itself = found == rows[:, None]
    itself[~itself.any(axis=1), -1] = True
    return found[~itself].reshape(-1, k)


class MetricWriter(contextlib.AbstractContextManager["MetricWriter"]):
    """Writes metrics as JSON lines (`metrics.jsonl`) and, optionally, as TensorBoard events."""

    def __init__(self, workdir: pathlib.Path, tensorboard: bool, resume_step: int = 0, quiet: bool = False) -> None:
        """Opens the files and drops lines of steps after `resume_step`, which an interrupted run wrote.

        A `quiet` writer writes nothing, because another process does.
        """
        self._file: TextIO | None = None
        self._board: Any = None
        if quiet:
            return
        self._workdir, path = workdir, workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
        with writing(workdir):
            with atomic_replace(path) as part:  # Lines cut off by a full disk would be lost.
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a")
            if tensorboard:
                from tensorboardX.event_file_writer import EventsWriter  # The imports are slow, and not all need them.
                from tensorboardX.proto.event_pb2 import SessionLog

                (workdir / "tensorboard").mkdir(exist_ok=True)
                # Written synchronously: tensorboardX's thread would die on a full disk and its queue fill up.
                self._board = EventsWriter(str(workdir / "tensorboard" / "events"))
                if resume_step:
                    self._write_event(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):  # Errors of a full disk were reported when the data were written.
                if file is not None:
                    file.close()

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Writes one line of metrics of kind `train` or `eval`; raises a RunError if it cannot be written."""
        if self._file is None:
            return
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        with writing(self._workdir):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            if self._board is not None:
                from tensorboardX.summary import scalar

                for name, value in values.items():
                    self._write_event(step, summary=scalar(f"{kind}/{name}", value))
                self._board.flush()

    def _write_event(self, step: int, **content: object) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._board.write_event(Event(wall_time=time.time(), step=step, **content))


class MetricLines(NamedTuple):
    """The contents of a run's `metrics.jsonl`: valid lines, oldest first, and the numbers, from 1, of damaged ones.

    The last line is `cut_off` by an interrupted write or a full disk.
    """

    lines: list[JsonObject]
    damaged: list[int]
    cut_off: bool


def scan_metrics(workdir: pathlib.Path) -> MetricLines:
    """Reads a run's `metrics.jsonl`, skipping damaged lines; a missing file has no lines."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return MetricLines([], [], False)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    lines, damaged, texts = [], [], data.split(b"\n")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            damaged.append(number)
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and isinstance(line.get("kind"), str):
            lines.append(line)
        else:
            damaged.append(number)
    return MetricLines(lines, damaged, cut_off=damaged[-1:] == [len(texts)])


def read_metrics(workdir: pathlib.Path) -> list[JsonObject]:
    """Returns the lines of a run's `metrics.jsonl`; see `scan_metrics`."""
    return scan_metrics(workdir).lines


def evaluations(lines: Sequence[JsonObject]) -> list[JsonObject]:
    """Returns the evaluation lines whose values are all finite; runs of older versions may have others."""
    evaluated = [line for line in lines if line["kind"] == "eval"]
    return [x for x in evaluated if all(math.isfinite(value) for value in x.values() if isinstance(value, float))]
