"""Metrics: how they are summed up, and where they are written."""

import contextlib
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from sit_jax import losses
from sit_jax.errors import RunError
from sit_jax.workdir import writing


@flax.struct.dataclass
class EvalMetrics(clu_metrics.Collection):
    """Loss, top-1 and top-5 accuracy over every example whose mask is 1."""

    loss: clu_metrics.Average.from_output("loss")
    top1: clu_metrics.Average.from_output("top1")
    top5: clu_metrics.Average.from_output("top5")


def eval_metrics(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> EvalMetrics:
    """The metrics of one batch.

    Args:
        logits: (batch, classes).
        labels: Class indices, (batch,), or those of all right classes, (batch, labels), filled up with -1: the one that
            the model finds likeliest counts.
        mask: 1 for examples that count, 0 for those that fill the batch up, (batch,).
    """
    if labels.ndim == 2:
        scores = jnp.where(labels >= 0, jnp.take_along_axis(logits, labels, axis=1), -jnp.inf)
        labels = jnp.take_along_axis(labels, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    rank = (logits > jnp.take_along_axis(logits, labels[:, None], axis=1)).sum(axis=1)
    loss = losses.label_cross_entropy(logits, labels)
    return EvalMetrics.single_from_model_output(loss=loss, top1=rank < 1, top5=rank < 5, mask=mask)


class MetricWriter:
    """Writes metrics as JSON lines (`metrics.jsonl`) and, where wanted, as TensorBoard events."""

    def __init__(self, workdir: pathlib.Path, tensorboard: bool, resume_step: int = 0, quiet: bool = False) -> None:
        """Opens the files; lines of steps after `resume_step`, from a run that was cut off, are dropped.

        Args:
            workdir: The run's folder.
            tensorboard: Whether to write events.
            resume_step: The step that the run goes on from.
            quiet: Write nothing at all: another process does.
        """
        self._file: Any = None
        self._board: Any = None
        if quiet:
            return
        self._workdir, path = workdir, workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
        with writing(workdir):
            # The whole new file or the old one: lines that a full disk cuts off would be lost for good.
            shorter = path.with_name(f".{path.name}.part")
            shorter.write_text("".join(json.dumps(line) + "\n" for line in kept))
            shorter.replace(path)
            self._file = path.open("a")
        if tensorboard:
            with writing(workdir):
                self._board = _Events(workdir / "tensorboard", resume_step + 1 if resume_step else None)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # What a full disk did not take was told when it was written.
                self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Writes one line of metrics; raises a RunError where the disk does not take it.

        Args:
            step: Optimizer steps done.
            kind: `train` or `eval`.
            values: Name -> value.
        """
        if self._file is None:
            return
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        with writing(self._workdir):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._board is not None:
            with writing(self._workdir):
                self._board.write(step, {f"{kind}/{name}": value for name, value in values.items()})


class _Events:
    """TensorBoard events, written at once: tensorboardX's thread would die of a full disk, and its queue fill up."""

    def __init__(self, folder: pathlib.Path, purge_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # Takes a while to import, and not every run wants it.
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MetricLines(NamedTuple):
    """What a run's `metrics.jsonl` holds.

    Attributes:
        lines: Its lines of metrics, oldest first; each has at least `step` and `kind`.
        damaged: Numbers, from 1, of lines that are none; they are left out.
        cut_off: Whether the last of these has no end: it was being written, or a full disk cut it off.
    """

    lines: list[dict[str, Any]]
    damaged: list[int]
    cut_off: bool


def scan_metrics(workdir: pathlib.Path) -> MetricLines:
    """Reads a run's `metrics.jsonl`, damaged or not; without one there are no lines.

    Raises:
        RunError: The file cannot be read.
    """
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


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, oldest first, without damaged ones, such as a last line that was cut off.

    Raises:
        RunError: The file cannot be read.
    """
    return scan_metrics(workdir).lines


def is_finite(values: dict[str, float]) -> bool:
    """Whether every metric is a finite number."""
    return all(math.isfinite(value) for value in values.values())
