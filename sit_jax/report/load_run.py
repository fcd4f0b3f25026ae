"""Loads a run directory, complete or not, without evaluating the model."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import TypeVar

from sit_jax.analysis.checkpoints import Entry, list_checkpoints, read_contents
from sit_jax.analysis.flops import count_cost
from sit_jax.config import Config, JsonObject
from sit_jax.config.config_dict import from_config_dict
from sit_jax.errors import UserError, one_line
from sit_jax.io.checkpoint import FOLDER
from sit_jax.io.runs import CONFIG, SUMMARY, is_run
from sit_jax.models.architecture import Architecture
from sit_jax.models.cut import cut_architecture
from sit_jax.training.elastic import choices, metric_key
from sit_jax.training.metrics import MetricLines, evaluations, scan_metrics

_METRICS = "metrics.jsonl"
_NUMBERS_NAMED = 5

T = TypeVar("T")
U = TypeVar("U")
Line = dict[str, float]


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The contents of a run directory.

    `name` is unique within a report. `values` is the configuration as stored, `config` the validated one; None if it is
    invalid. `train` and `scores` are lines of metrics and of evaluations, oldest first, with finite numbers only.
    `metadata` is that of the newest checkpoint. `teachers` are those with a run of their own, by the name of their
    section. What is missing or damaged is empty, such as the `summary` of an unfinished run, and `missing` has a
    sentence about it.
    """

    name: str
    folder: pathlib.Path
    values: JsonObject
    config: Config | None
    train: list[Line]
    scores: list[Line]
    summary: JsonObject
    checkpoints: list[Entry]
    metadata: JsonObject
    teachers: dict[str, "RunInfo"]
    missing: list[str]

    @property
    def step(self) -> int:
        """The last known step."""
        lines = [int(line["step"]) for line in (*self.train[-1:], *self.scores[-1:])]
        return max([*lines, *(entry.step for entry in self.checkpoints)], default=0)

    @property
    def total_steps(self) -> int | None:
        """Total number of steps; None if no checkpoint runs the length of an epoch."""
        data = self.metadata.get("data")
        epoch = finite(data.get("epoch")) if isinstance(data, dict) else None
        if self.config is None or not self.checkpoints or not epoch:
            return None
        epochs = self.config.epochs + self.config.optim.cooldown_epochs
        return round(self.checkpoints[-1].step / epoch * epochs)

    @property
    def has_labels(self) -> bool:
        """Whether the run is trained and evaluated with labels; True if the configuration is not known."""
        return self.config is None or self.config.loss.uses_labels

    @property
    def similarity(self) -> dict[str, float | None]:
        """Cosine similarity and agreements with the teacher, None if unknown; empty for a run with labels.

        They are those of the summary; without one, of the last evaluation.
        """
        if self.has_labels:
            return {}
        stored = self.summary.get("student")
        known = stored if isinstance(stored, dict) else self.scores[-1] if self.scores else {}
        return {key: finite(known.get(key)) for key in ("cosine", "agreement1", "agreement5")}

    def architecture(self, name: str) -> Architecture | None:
        """Returns the architecture of the `student` (or only model) or `teacher`, if it is a vision transformer."""
        config = self.config if name == "student" else self.teacher_config
        arch = config.model.architecture if config else None
        return arch if isinstance(arch, Architecture) else None

    def entry(self, name: str) -> dict[str, float | None]:
        """Returns top-1, parameters, GMAC and images/s of the `student` (or only model) or `teacher`; None if unknown.

        Without a summary, the accuracy is that of the last evaluation, and the cost is counted from the configuration.
        """
        stored = self.summary.get(name)
        known = {key: finite(value) for key, value in stored.items()} if isinstance(stored, dict) else {}
        run, arch = self if name == "student" else self.teachers.get(name), self.architecture(name)
        scores = run.scores if run else []
        if known.get("top1") is None and scores:
            known["top1"] = scores[-1].get("top1")
        # With labels, 0 classes are as many as the data has.
        if arch is not None and (arch.num_classes or not self.has_labels) and known.get("gmac") is None:
            cost = count_cost(arch)
            known |= {"params": cost.params, "gmac": cost.gmac}
        return {key: known.get(key) for key in ("top1", "params", "gmac", "images_per_s")}

    @property
    def schedules(self) -> list[dict[str, float | str | None]]:
        """Accuracy or similarity and cost of each token schedule of the student, None if unknown.

        The accuracies are those of the last evaluation. Empty for a student with one schedule.
        """
        if self.config is None:
            return []
        arch, last = self.architecture("student"), self.scores[-1] if self.scores else {}
        stored = self.summary.get("schedules")
        measured = [x for x in stored if isinstance(x, dict)] if isinstance(stored, list) else []
        rows: list[dict[str, float | str | None]] = []
        for kept in choices(self.config):
            assert arch is not None
            cut = cut_architecture(arch, kept)
            found = next((x for x in measured if x.get("kept_tokens") == list(kept)), {})
            rows.append(
                {
                    "tokens": "/".join(map(str, kept)),
                    **{key: finite(last.get(metric_key(key, arch.token_counts, kept))) for key in ("top1", "cosine")},
                    "gmac": count_cost(cut).gmac if arch.num_classes or not self.has_labels else None,
                    "images_per_s": finite(found.get("images_per_s")),
                }
            )
        return rows

    @property
    def teacher_config(self) -> Config | None:
        """The configuration of the teacher's training; None without a teacher."""
        if self.config is None or self.config.teacher is None:
            return None
        return self.config.teacher_run(self.config.teacher)

    @property
    def training_rate(self) -> float | None:
        """Images per second in training, without evaluations and pauses: the median over the lines of metrics."""
        if self.config is None:
            return None
        pairs = zip(self.train, self.train[1:], strict=False)
        rates = [
            (after["step"] - before["step"]) * self.config.batch_size / (after["time"] - before["time"])
            for before, after in pairs
            if after.get("time", 0) > before.get("time", math.inf)
        ]
        return statistics.median_high(rates) if rates else None


def read_run(folder: pathlib.Path, name: str = "", is_teacher: bool = False) -> RunInfo:
    """Loads a run directory; the run of a teacher has no summary.

    Raises a UserError if there is no such folder, or it is not a run directory.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the folder of a run")
    if not any((folder / part).exists() for part in (CONFIG, _METRICS, FOLDER)):
        raise UserError(f"{folder}: is not a run directory: it has no {CONFIG}, {_METRICS} or {FOLDER}")
    missing: list[str] = []
    values = _read_object(folder / CONFIG, missing)
    config = None
    if values:
        read = functools.partial(from_config_dict, copy.deepcopy(values), quiet=True)
        config = attempt(read, None, missing, "The configuration")
    metrics = attempt(lambda: scan_metrics(folder), MetricLines([], [], False), missing, "The metrics")
    _tell_damage(folder, metrics, missing)
    summary = _read_object(folder / SUMMARY, missing) if (folder / SUMMARY).exists() else {}
    evaluated = [line for line in metrics.lines if line["kind"] == "eval"]
    whole = evaluations(evaluated)
    wrong = [str(line["step"]) for line in evaluated if line not in whole]
    if wrong:
        missing.append(f"The evaluation of step {', '.join(wrong)} is not finite; it is left out.")
    if wrong and str(evaluated[-1]["step"]) in wrong and isinstance(summary.get("student"), dict):
        summary["student"]["top1"] = None  # Older versions counted correct predictions differently.
    metadata: JsonObject = {}
    checkpoints: list[Entry] = attempt(lambda: list_checkpoints(folder), [], missing, "The checkpoints")
    if checkpoints:
        metadata = attempt(lambda: read_contents(folder).metadata, metadata, missing, "The newest checkpoint")
    run = RunInfo(
        name=name or folder.resolve().name,
        folder=folder,
        values=values,
        config=config,
        train=[_finite_line(line) for line in metrics.lines if line["kind"] == "train"],
        scores=[_finite_line(line) for line in whole],
        summary=summary,
        checkpoints=checkpoints,
        metadata=metadata,
        teachers=_load_teachers(folder, config, missing),
        missing=missing,
    )
    if not summary and not (is_teacher and run.step == run.total_steps):
        missing.insert(0, _progress(run))
    return run


def read_runs(folders: list[pathlib.Path]) -> list[RunInfo]:
    """Loads several runs and gives each a unique name; raises a UserError if a folder is given twice, or not a run."""
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(f"{folders[index]}: is given twice")
    return [read_run(folder, name) for folder, name in zip(folders, _short_names(resolved), strict=True)]


def _short_names(folders: list[pathlib.Path]) -> list[str]:
    """Returns the last parts of the paths, as few as make them unique."""
    counts = range(1, 1 + max(len(folder.parts) for folder in folders))
    names = (["/".join(folder.parts[-count:]) for folder in folders] for count in counts)
    return next(found for found in names if len(set(found)) == len(found))


def finite(value: object) -> float | None:
    """Returns a value if it is a finite number, otherwise None, as damaged files may contain any value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def _finite_line(line: JsonObject) -> Line:
    return {key: number for key, value in line.items() if (number := finite(value)) is not None}


def _load_teachers(folder: pathlib.Path, config: Config | None, missing: list[str]) -> dict[str, RunInfo]:
    found: dict[str, RunInfo] = {}
    for name, teacher in (config.teachers if config else {}).items():
        place = pathlib.Path(teacher.run) if teacher.run else folder / name
        if not place.exists():
            problem = f"{name}.run: there is no {place}." if teacher.run else f"The {name}'s training has not begun."
            missing.append(problem)
        elif not teacher.run or is_run(place):  # Weights of another framework have no history.
            place = place.parent.parent if place.parent.name == FOLDER else place
            read = functools.partial(read_run, place, name, is_teacher=True)
            run = attempt(read, None, missing, f"The {name}")
            if run is not None:
                found[name] = run
                missing += [f"{name}: {text}" for text in run.missing]
    return found


def attempt(read: Callable[[], T], otherwise: U, missing: list[str], what: str) -> T | U:
    """Returns the result of `read`; on an error returns `otherwise` and adds a sentence about `what` to `missing`."""
    try:
        return read()
    except UserError as error:
        missing.append(f"{str(error)[:1].upper()}{str(error)[1:]}.")
    except Exception as error:  # The page reports the error instead of failing, since damaged files raise many types.
        missing.append(f"{what} cannot be read: {type(error).__name__}: {one_line(error, 200)}.")
    return otherwise


def _read_object(path: pathlib.Path, missing: list[str]) -> JsonObject:
    def read() -> JsonObject:
        values = json.loads(path.read_bytes()) if path.exists() else None
        if not isinstance(values, dict) or not values:
            raise UserError(f"there is {'nothing in' if path.exists() else 'no'} {path.name}")
        return values

    return attempt(read, {}, missing, path.name)


def _tell_damage(folder: pathlib.Path, metrics: MetricLines, missing: list[str]) -> None:
    if not (folder / _METRICS).exists():
        missing.append(f"There is no {_METRICS}: no step was logged.")
    if damaged := metrics.damaged[:-1] if metrics.cut_off else metrics.damaged:
        numbers = ", ".join(map(str, damaged[:_NUMBERS_NAMED])) + (", ..." if len(damaged) > _NUMBERS_NAMED else "")
        missing.append(f"{_METRICS}: {len(damaged)} damaged line(s) left out ({numbers}).")
    if metrics.cut_off:
        missing.append(f"{_METRICS}: the last line is cut off, as while a run writes it.")


def _progress(run: RunInfo) -> str:
    total = run.total_steps
    if total is not None and run.step == total:
        return f"All {total:,} steps are done, but there is no {SUMMARY}; sit train --resume makes it."
    return f"The run has not finished: it is at step {run.step:,}" + (f" of {total:,}." if total else ".")
