"""The folder of a run: what it contains, what identifies it, and whether a run may start in it.

- config.json        the configuration (`read_config`)
- class_names.json   names of the classes, by index
- checkpoints/STEP/  weights, optimizer and moving average (`io/checkpoint.py` reads, `training/checkpoint.py` writes)
- metrics.jsonl      one line for each logged step and each evaluation (`training/metrics.py`)
- tensorboard/       the same metrics as event files of TensorBoard
- teacher/           the run of the teacher, if it was trained here; also cnn_teacher/
- summary.json, curves.png, slimming.png   written at the end (`analysis/summary.py`)
- report.html        written by `sit report`
- .lock              held by the trainer (`io/lock.py`)

The folder of a comparison has compare.json and index.html, and one run directory for each training (`sit compare`).
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from sit_jax.config import Config, JsonObject
from sit_jax.config.config_dict import from_config_dict, to_dict
from sit_jax.config.resume import Change, changes
from sit_jax.data.sources import nfc
from sit_jax.errors import ConfigError, RunError, listed, one_line
from sit_jax.io.atomic_write import atomic_replace
from sit_jax.io.checkpoint import FOLDER

CONFIG = "config.json"
CLASS_NAMES = "class_names.json"
SUMMARY = "summary.json"
COMPARE = "compare.json"
COMPARE_PAGE = "index.html"


def create_or_verify(workdir: pathlib.Path, config: Config, resume: bool) -> None:
    """Claims a run directory for a configuration, or verifies that its run can resume with this configuration.

    Until the run has a checkpoint, it can resume with any configuration.

    Raises:
        ConfigError: The run there has another value of a key that cannot change; see `sit_jax.config.resume`.
        RunError: The folder cannot be written, or contains this run and `resume` is False.
    """
    path, advice = workdir / CONFIG, "choose another --workdir"
    if path.exists():
        started = has_checkpoint(workdir)
        # Converted to the current format: a run of an older version lacks newer keys, which are all at their defaults.
        found = changes(read_config(workdir), config) if started or not resume else []
        others = [change for change in found if change.effect == "other" and not _moved(change)]
        if others:
            text = listed([f"{x.key} is {x.before!r} there and {x.now!r} here" for x in others])
            way = f"; --config.init={workdir} starts from its weights" if started else ""
            problem = f"{workdir} contains a run of another configuration ({text}); {advice}{way}"
            raise ConfigError(others[0].key, problem)
        if not resume:
            raise RunError(f"{workdir} already holds this run; pass --resume to continue it, or {advice}")
        with writing(workdir):  # Fails here instead of at the first checkpoint.
            tempfile.TemporaryFile(dir=workdir).close()
        return
    if (workdir / FOLDER).exists():
        raise RunError(f"{workdir} holds checkpoints but no {CONFIG}; {advice}")
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, to_dict(config))


def _moved(change: Change) -> bool:
    """Returns whether a change is the new path of a teacher whose old path does not exist any more."""
    return change.key.endswith("teacher.run") and bool(change.before) and not pathlib.Path(change.before).exists()


def update_config(workdir: pathlib.Path, config: Config) -> None:
    """Replaces the configuration of a run that resumes; a summary of the run so far is removed."""
    if read_config(workdir) != config:
        with writing(workdir):
            write_json(workdir / CONFIG, to_dict(config))
            (workdir / SUMMARY).unlink(missing_ok=True)


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Returns whether a run directory contains a complete checkpoint."""
    folder = workdir / FOLDER
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def find_checkpoint(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Returns run directory and step of a path `RUN/checkpoints/STEP`; for a run directory, the step is None."""
    if path.parent.name == FOLDER and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def is_run(path: pathlib.Path) -> bool:
    """Returns whether a path is a run directory, with a checkpoint or without, or one of its checkpoints."""
    folder, _ = find_checkpoint(path)
    if (folder / FOLDER).is_dir():
        return True
    try:
        # Model folders, of this or another program, have a config.json as well.
        return "optim" in read_object(folder / CONFIG)
    except RunError:
        return False


def is_comparison(path: pathlib.Path) -> bool:
    """Returns whether a path is the folder of a comparison of token reducers that has a result."""
    return (path / COMPARE).is_file()


def read_config(workdir: pathlib.Path) -> Config:
    """Returns the configuration of a run directory; raises a RunError if the folder is none."""
    path = workdir / CONFIG
    if not path.is_file():
        raise RunError(f"{workdir} is not a run directory: it has no {CONFIG}")
    return from_config_dict(read_object(path), quiet=True)


def create_or_verify_class_names(workdir: pathlib.Path, names: Sequence[str]) -> None:
    """Writes the class names of a run's data, or raises a RunError if it started with others or in another order."""
    known = read_class_names(workdir)
    if known is None or not has_checkpoint(workdir):
        with writing(workdir):
            write_json(workdir / CLASS_NAMES, list(names))
    elif list(map(nfc, known)) != list(map(nfc, names)):
        index = next((i for i, pair in enumerate(zip(known, names, strict=False)) if pair[0] != pair[1]), None)
        first = f"class {index} was {known[index]!r} and is {names[index]!r}" if index is not None else "their number"
        raise RunError(f"{workdir} began with other classes than the data has now ({first}); choose another --workdir")


def read_class_names(workdir: pathlib.Path) -> list[str] | None:
    """Returns the class names of a run, by index, or None for a run of an older version, which does not store them."""
    path = workdir / CLASS_NAMES
    if not path.exists():
        return None
    names = _read(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunError(f"{path} must hold a list of names")
    return names


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Converts file system errors to a RunError that names the run directory."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{workdir} cannot be written: {reason}; fix that, or choose another --workdir") from None


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON atomically."""
    with atomic_replace(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def read_object(path: pathlib.Path) -> JsonObject:
    """Reads a JSON object; raises a RunError if the file cannot be read or is none."""
    values = _read(path)
    if not isinstance(values, dict):
        raise RunError(f"{path}: is not a JSON object")
    return values


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: is not valid JSON: {one_line(error, 200)}") from None
