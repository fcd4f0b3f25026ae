"""Implementation of `sit compare`: trains token reducers by one recipe and collects accuracy, cost and speed."""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from sit_jax.analysis.benchmark_models import random_benchmark_model
from sit_jax.analysis.benchmark_table import Settings, benchmark
from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.jobs import Failure, Job, devices_of_slots, log, run_jobs
from sit_jax.analysis.summary import named_teacher
from sit_jax.analysis.table import cell, print_table
from sit_jax.config import Config, JsonObject, Sweep
from sit_jax.config.resume import changes
from sit_jax.config.sweep import Point
from sit_jax.data.registry import open_source
from sit_jax.errors import ConfigError, RunError, listed, require
from sit_jax.io import runs
from sit_jax.io.lock import locked
from sit_jax.io.model import Model
from sit_jax.models import abstract_variables
from sit_jax.models.architecture import Architecture
from sit_jax.models.reducers.base import find_reducer
from sit_jax.training.evaluate import evaluate_model

TEACHER = "teacher"
_ROUNDS = 9


class Recipe(NamedTuple):
    """A config file and its overrides.

    Attributes:
        page: The `--config` argument.
        overrides: `--config.KEY=VALUE` arguments.
        load: Reads the file with further overrides.
    """

    page: str
    overrides: Sequence[str]
    load: Callable[[Sequence[str]], Config]

    def command(self, workdir: pathlib.Path, more: Sequence[str]) -> list[str]:
        """Returns the arguments of `sit` that train by the recipe with further arguments, or continue to."""
        return ["train", "--config", self.page, *self.overrides, *more, "--workdir", str(workdir), "--resume"]


class Plan(NamedTuple):
    """The points of a sweep.

    Attributes:
        configs: Point -> its configuration; its teacher is a run.
        teacher: The configuration of the teacher's training in the workdir; None if there is another teacher.
        overrides: Arguments that name the teacher's run; empty if there is another.
        notes: What is left out.
    """

    configs: dict[Point, Config]
    teacher: Config | None
    overrides: list[str]
    notes: list[str]


def compare(recipe: Recipe, sweep: Sweep, workdir: pathlib.Path, parallel: int, seconds: float) -> JsonObject:
    """Trains all points of a sweep that are not complete, evaluates and times them, and writes `compare.json`.

    Args:
        recipe: The config file, which has a teacher.
        sweep: What to compare.
        workdir: The folder, with one run directory for each point.
        parallel: Number of simultaneous trainings.
        seconds: Measuring time of each model and batch size.

    Returns:
        The contents of `compare.json`: `page`, `overrides`, `trained` (what the models are trained on, and how long),
        `teacher`, `rows`, `measured`, `reported`, `notes` and `failed`. A row is one reducer, keep ratio and objective,
        with `gmac`, `top1` (mean over the seeds, fraction of 1, None if all failed), `least`, `most`, `seeds` (seed ->
        top-1) and `images_per_s` (batch size -> images/s).

    Raises:
        ConfigError: A value does not fit, or a run in the workdir has another configuration.
        RunError: The teacher's training failed.
        PreemptedError: A signal; the same command continues.
    """
    plan = make_plan(recipe, sweep, workdir)
    slots = devices_of_slots(parallel)
    with locked(workdir):
        failures = _train(recipe, plan, workdir, slots)
        result = {
            "page": recipe.page,
            "overrides": list(recipe.overrides),
            "trained": _training(next(iter(plan.configs.values()))),
            **_measure(plan, sweep, workdir, seconds),
            "reported": [entry._asdict() for entry in sweep.reported],
            "notes": plan.notes,
            "failed": [{"name": x.name, "log": str(x.log), "reason": x.reason} for x in failures],
        }
        with runs.writing(workdir):
            runs.write_json(workdir / runs.COMPARE, result)
    return result


def _training(config: Config) -> str:
    """Returns a text about the training of a recipe: `digits, train, 4 epochs, batch 64`."""
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    return f"{config.data.name}, {config.data.train_split}, {epochs}, batch {config.batch_size}"


def _train(recipe: Recipe, plan: Plan, workdir: pathlib.Path, slots: Sequence[str | None]) -> list[Failure]:
    """Trains the teacher, then all points that are not complete; returns those that failed."""
    if plan.teacher is not None:
        folder = workdir / TEACHER
        command = recipe.command(workdir, ["--only_teacher"])
        failures = run_jobs([Job(TEACHER, folder, command, lambda: _accuracy(folder))], [None])
        if failures:
            raise RunError(f"the teacher's training failed: {failures[0].reason}; see {failures[0].log}")
    jobs = [_job(recipe, point, plan, workdir) for point in plan.configs if point.objective != "untrained"]
    log(f"{sum(job.outcome() is not None for job in jobs)} of {len(jobs)} trainings are complete")
    return run_jobs(jobs, slots)


def make_plan(recipe: Recipe, sweep: Sweep, workdir: pathlib.Path) -> Plan:
    """Validates all points of a sweep, and the runs that exist; raises a ConfigError."""
    base = recipe.load(())
    require(base.teacher is not None, "teacher", "must be set for a comparison: the reducers start from its weights")
    require(base.loss.uses_labels, "loss.classification", "must be above 0 for a comparison, which is by accuracy")
    arch = base.model.architecture
    for name in ("kept_tokens_choices", "kept_tokens"):
        has_counts = isinstance(arch, Architecture) and getattr(arch, name)
        require(not has_counts, f"model.{name}", "must be empty for a comparison, which sets model.keep_ratio")
    assert base.teacher is not None
    is_own = not base.teacher.run
    cnn = base.cnn_teacher
    problem = "must be set for a comparison: every training would train that teacher anew"
    require(cnn is None or bool(cnn.run), "cnn_teacher.run", problem)
    # The absolute path is in the configurations of the runs, so that they can be opened from anywhere.
    overrides = [f"--config.teacher.run={(workdir / TEACHER).resolve()}"] if is_own else []
    if not is_own:
        given = base.teacher.run
        require(pathlib.Path(given).exists(), "teacher.run", f"there is no {given}; without it, a teacher is trained")
    configs, notes = {}, []
    for reducer in sweep.reducers:
        find_reducer(reducer)
    for point in sweep.points:
        config = recipe.load([*point.overrides, *overrides])
        if point.objective == "untrained" and not _can_start_from_teacher(config):
            notes.append(
                f"{point.reducer}: is not compared untrained: it has parameters that the teacher does not have"
            )
        else:
            configs[point] = config
    notes = list(dict.fromkeys(notes))
    for note in notes:
        log(note)
    require(bool(configs), "objectives", "leave nothing to compare")
    teacher = base.teacher_run(base.teacher) if is_own else None
    plan = Plan(configs, teacher, overrides, notes)
    _check_runs(plan, workdir)
    return plan


def _can_start_from_teacher(config: Config) -> bool:
    """Returns whether the teacher has every parameter of the student, so that the student needs no training."""
    assert config.teacher is not None
    mine, theirs = (_parameters(section.architecture) for section in (config.model, config.teacher.model))
    return mine <= theirs


def _parameters(arch: object) -> set[tuple[str, ...]]:
    assert isinstance(arch, Architecture)
    return set(flatten_dict(abstract_variables(dataclasses.replace(arch, num_classes=arch.num_classes or 1))["params"]))


def _check_runs(plan: Plan, workdir: pathlib.Path) -> None:
    """Raises a ConfigError if a run has another configuration than its point: the rows would not be comparable."""
    known = {workdir / point.name: config for point, config in plan.configs.items()}
    if plan.teacher is not None:
        known[workdir / TEACHER] = plan.teacher
    for folder, config in known.items():
        if not (folder / runs.CONFIG).exists():
            continue
        there = runs.read_config(folder)
        found = changes(there, config.with_classes(there.model.architecture.num_classes))
        # The teacher in the workdir has another path where the workdir was moved.
        moved = {"teacher.run"} if plan.teacher is not None else set()
        found = [x for x in found if x.effect != "free" and x.key not in moved]
        if found:
            others = [f"{x.key} is {x.before!r} there and {x.now!r} here" for x in found]
            problem = f"{folder} contains a run of another configuration ({listed(others)}); choose another workdir"
            raise ConfigError("--workdir", problem)


def _job(recipe: Recipe, point: Point, plan: Plan, workdir: pathlib.Path) -> Job:
    folder = workdir / point.name
    command = recipe.command(folder, [*point.overrides, *plan.overrides])
    return Job(point.name, folder, command, lambda: _accuracy(folder))


def _accuracy(folder: pathlib.Path) -> str | None:
    top1 = _top1(folder)
    return None if top1 is None else f"top-1 {top1:.2%}"


def _top1(folder: pathlib.Path) -> float | None:
    """Returns the accuracy in the summary of a complete run."""
    path = folder / runs.SUMMARY
    return float(runs.read_object(path)["student"]["top1"]) if path.exists() else None


def _measure(plan: Plan, sweep: Sweep, workdir: pathlib.Path, seconds: float) -> JsonObject:
    """Evaluates what was not trained, and times all models in turns."""
    first = next(iter(plan.configs.values()))
    names = open_source(first.data, first.data.eval_split).class_names
    configs = {point: config.with_classes(len(names)) for point, config in plan.configs.items()}
    teacher = named_teacher(next(iter(configs.values())), names)
    grouped: dict[tuple[str, float, str], dict[Point, Config]] = {}
    for point, config in configs.items():
        grouped.setdefault((point.reducer, point.keep_ratio, point.objective), {})[point] = config
    rows, archs = [], {TEACHER: teacher.vit}
    for (reducer, ratio, objective), members in grouped.items():
        config = next(iter(members.values()))
        arch = config.model.architecture
        assert isinstance(arch, Architecture)
        if objective == "untrained":
            log(f"evaluating {next(iter(members)).name}")
            model = dataclasses.replace(teacher, arch=arch, config=config, dtype=config.model.dtype)
            seeds, scores = {}, [_evaluate(model)]
        else:
            found = {str(point.seed): _top1(workdir / point.name) for point in members}
            seeds = {seed: top1 for seed, top1 in found.items() if top1 is not None}
            scores = list(seeds.values())
        archs[f"{reducer} {ratio}"] = arch
        cost = count_cost(arch)
        rows.append(
            {
                "reducer": reducer,
                "keep_ratio": ratio,
                "objective": objective,
                "tokens": arch.token_counts,
                "gmac": cost.gmac,
                "params": cost.params,
                **_spread(scores),
                "seeds": seeds,
            }
        )
    log("evaluating the teacher")
    entry = {"gmac": count_cost(teacher.vit).gmac, "params": count_cost(teacher.vit).params}
    entry["top1"] = _evaluate(teacher)
    measured, speeds = _time(archs, first.model.dtype, sweep.batch_sizes, seconds)
    for row in rows:
        row["images_per_s"] = speeds[f"{row['reducer']} {row['keep_ratio']}"]
    return {"teacher": {**entry, "images_per_s": speeds[TEACHER]}, "rows": rows, "measured": measured}


def _evaluate(model: Model) -> float:
    return evaluate_model(model, match_names=False)["top1"]


def _spread(scores: Sequence[float]) -> dict[str, float | None]:
    if not scores:
        return {"top1": None, "least": None, "most": None}
    return {"top1": statistics.fmean(scores), "least": min(scores), "most": max(scores)}


def _time(
    archs: Mapping[str, Architecture], dtype: str, batch_sizes: Sequence[int], seconds: float
) -> tuple[str, dict[str, dict[str, float]]]:
    """Returns what was measured on, and model -> batch size -> images/s."""
    models = [random_benchmark_model(name, arch) for name, arch in archs.items()]
    result = benchmark(models, Settings(batch_sizes, dtype, seconds, _ROUNDS))
    speeds: dict[str, dict[str, float]] = {name: {} for name in archs}
    for row in result["rows"]:
        speeds[row["model"]][str(row["batch"])] = row["images_per_s"]
    return f"{result['device']}, {dtype}, JAX {result['jax']}, {result['date']}", speeds


def pareto_front(points: Sequence[tuple[float, float | None]], more_is_better: bool = False) -> list[bool]:
    """Returns which pairs of a cost and an accuracy no other pair surpasses in both.

    Args:
        points: Pairs; an accuracy of None is surpassed by all.
        more_is_better: Whether the first value is a speed instead of a cost.
    """
    sign = -1 if more_is_better else 1
    known = [(sign * cost, score) for cost, score in points if score is not None]

    def is_front(cost: float, score: float) -> bool:
        return not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in known)

    return [score is not None and is_front(sign * cost, score) for cost, score in points]


def print_comparison(result: JsonObject) -> None:
    """Prints the comparison as a table on standard output, the Pareto front of accuracy and GMAC marked by `*`."""
    teacher, rows = result["teacher"], result["rows"]
    lines = [{"reducer": TEACHER, "keep_ratio": "", "objective": "", "seeds": {}, **teacher}, *rows]
    front = pareto_front([(line["gmac"], line["top1"]) for line in lines])
    batches = list(teacher["images_per_s"])
    headings = ["reducer", "keep ratio", "objective", "GMAC", "of teacher", "top-1", "min", "max", "seeds", "front"]
    table = []
    for line, is_front in zip(lines, front, strict=True):
        several = len(line["seeds"]) > 1
        table.append(
            (
                line["reducer"],
                str(line["keep_ratio"]),
                line["objective"],
                f"{line['gmac']:.4g}",
                f"{line['gmac'] / teacher['gmac']:.0%}",
                cell(line["top1"], "{:.2%}") or "failed",
                *(cell(line[key] if several else None, "{:.2%}") for key in ("least", "most")),
                str(len(line["seeds"]) or ""),
                "*" if is_front else "",
                *(f"{line['images_per_s'][batch]:,.0f}" for batch in batches),
            )
        )
    headings += [f"images/s, batch {batch}" for batch in batches]
    print_table(headings, table, left=("reducer", "objective"), title=f"Images/s: {result['measured']}")
