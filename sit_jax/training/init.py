"""Initializes a run's state and its teachers."""

import pathlib
import sys
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from sit_jax.config import Config, TeacherConfig
from sit_jax.data.classes import class_order, reorder_heads
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.checkpoint import FOLDER
from sit_jax.io.convert.adapt import replace_heads
from sit_jax.io.convert.initial import check_start, differences, initial_weights
from sit_jax.io.convert.read import Options, silent
from sit_jax.io.load import load_run, read_weights
from sit_jax.io.metadata import run_class_names
from sit_jax.io.runs import find_checkpoint, has_checkpoint, is_run, read_config
from sit_jax.models import HEADS
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.trees import Params, Variables
from sit_jax.parallel import distributed, sharding
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.state import TrainState
from sit_jax.training.step import Teachers, TrainSpec, abstract_state, init_state


def initial_state(
    spec: TrainSpec,
    checkpoints: Checkpoints,
    mesh: Mesh,
    teachers: Teachers,
    class_names: Sequence[str] | None = None,
) -> TrainState:
    """Returns the state that a run starts or resumes with, from the first source that applies:

    1. the newest complete checkpoint of the run: weights, optimizer, moving average, statistics and step;
    2. the weights that `init` names, with a new optimizer: a run directory (its newest checkpoint) or one of its
       checkpoints, `RUN/checkpoints/STEP`;
    3. or anything else that `sit convert` reads: a model folder, or a file of PyTorch, safetensors or NumPy;
    4. the weights of the teacher, if `init` is `teacher` and there is a teacher;
    5. random weights.

    Parameters that the weights of 2, 3 and 4 lack by design (see `check_start`) are random, and are listed on stderr.
    Reverse modules are taken as well if the weights of 2 or 3 have them and the run trains any.
    Heads of the weights that `init` names are reordered to match `class_names`, those of the data by index, and are new
    for other classes; None matches classes by index. The mesh may differ from that of the checkpoint. Raises a
    UserError if the weights that `init` names cannot be read, or are of another model.
    """
    if checkpoints.latest_step is not None:
        return checkpoints.restore(sharding.place_abstract(mesh, abstract_state(spec)))
    variables = _initial(spec.config, teachers, class_names, _log)
    state = init_state(spec, mesh, variables)
    if variables is not None:
        _log_taken(state.params, {"model": variables["params"], "rtsm": variables.get("rtsm", {})})
    return state


def _log_taken(params: Params, given: Params) -> None:
    """Lists what the initial weights have, the parameters that they lack, and those that the model does not use."""
    drawn = sorted(params["model"].keys() - given["model"].keys(), key=lambda name: (len(name), name))
    drawn += ["reverse modules"] if "rtsm" in params and not given["rtsm"] else []
    left = sorted(given["model"].keys() - params["model"].keys())
    taken = ["the model"] + (["reverse modules"] if given["rtsm"] else [])
    for what, names in (("taken", taken), ("randomly initialized", drawn), ("left out", left)):
        if names:
            _log(f"{what}: {', '.join(names)}")


def _initial(
    config: Config, teachers: Teachers, class_names: Sequence[str] | None, log: Callable[[str], None]
) -> Variables | None:
    """Returns the weights that `init` names, with `rtsm` if they have it and the run trains it.

    The result is None for random ones, and for those of a teacher that is not there yet.
    """
    path, arch = pathlib.Path(config.init), config.model.architecture
    if config.init == "random":
        return None
    if config.init == "teacher":
        if config.teacher is not None:
            check_start(config.teacher.model.architecture, arch, "the teacher")
        return teachers.get("teacher")
    if not path.exists():
        raise ConfigError("init", f"there is no {path}; name a run, a model folder or a file of weights")
    rtsm = config.recovered is not None
    if (path / FOLDER).is_dir():
        theirs = read_config(path)
        check_start(theirs.model.architecture, arch, str(path))
        model = load_run(path, with_rtsm=rtsm and theirs.recovered is not None)
        if theirs.recovered and not rtsm:
            log("changed: RTSMs left out")
    elif isinstance(arch, Architecture):
        model = initial_weights(path, arch, log, rtsm)
    else:
        raise ConfigError("init", f"{path} is not a run; models other than vision transformers start from runs only")
    variables = {**model.variables, "rtsm": model.rtsm}
    names, count = model.metadata.get("class_names"), model.arch.num_classes
    try:
        if count != arch.num_classes:
            raise UserError(f"{path} has {count} classes and not {arch.num_classes}")
        return reorder_heads(variables, class_order(names, class_names, str(path), "the data"), HEADS)
    except UserError as problem:
        log(f"{problem}; the heads are new")
        params = {name: value for name, value in variables["params"].items() if name not in HEADS}
        return {**variables, "params": params}


def _log(line: str) -> None:
    if distributed.is_process_0():
        print(f"init: {line}", file=sys.stderr)


def given_teacher(teacher: TeacherConfig, name: str, class_names: Sequence[str] | None = None) -> Variables:
    """Returns the variables of a trained teacher: those of a run, or any weights that `sit convert` reads.

    Heads are left out if the section has no classes.

    `teacher` is the section `name` of the configuration. The heads are reordered to match `class_names`, those of the
    data by index; None matches by index. Raises a UserError if the weights cannot be read, or are of another model or
    of other classes.
    """
    path, arch = pathlib.Path(teacher.run), teacher.model.architecture
    if is_run(path):
        model = load_run(path)
    elif isinstance(arch, Architecture):
        model = read_weights(path, options=Options(like=arch, rtsm=False))
    else:
        problem = f"{teacher.run} is not a run; teachers other than vision transformers must be runs"
        raise ConfigError(f"{name}.run", problem)
    if isinstance(model.arch, Architecture) and not arch.num_classes:
        model = replace_heads(model, 0, silent)
    order = _teacher_order(model.arch, model.metadata.get("class_names"), teacher, name, class_names)
    return reorder_heads(model.variables, order, HEADS)


def _teacher_order(
    theirs: Architecture | RegNetArchitecture,
    names: Sequence[str] | None,
    teacher: TeacherConfig,
    name: str,
    class_names: Sequence[str] | None,
) -> list[int] | None:
    """Returns the order of the heads' classes; raises a ConfigError if the model is not that of the section `name`."""
    mine = teacher.model.architecture
    problem = differences(theirs, mine, () if mine.num_classes else ("num_classes",))
    if problem:
        raise ConfigError(f"{name}.run", f"the model in {teacher.run} does not match {name}.model: {problem}")
    if teacher.match_classes == "index":
        return None
    try:
        return class_order(names, class_names, teacher.run, "the data")
    except UserError as problem:
        advice = f"if they are the same classes in the same order, set {name}.match_classes=index"
        raise ConfigError(f"{name}.run", f"{problem}; {advice}") from None


def check_origins(config: Config, folder: pathlib.Path, class_names: Sequence[str] | None = None) -> None:
    """Raises a UserError if weights that a configuration names are missing or are of another model.

    If the run directory contains a checkpoint, `init` is not used. Without class names, classes are not checked.
    """
    for name, teacher in config.teachers.items():
        if not teacher.run:
            check_origins(config.teacher_run(teacher), folder / name, class_names)
        elif is_run(pathlib.Path(teacher.run)):
            run, _ = find_checkpoint(pathlib.Path(teacher.run))
            theirs = read_config(run)
            _teacher_order(theirs.model.architecture, run_class_names(theirs, run), teacher, name, class_names)
        else:
            given_teacher(teacher, name, class_names)
    if not has_checkpoint(folder):
        _initial(config, {}, class_names, lambda _: None)
