"""Reads weights from wherever they lie: files of PyTorch, safetensors and NumPy, model folders and runs."""

import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tqdm import tqdm

from sit_jax.convert.arguments import Options
from sit_jax.convert.change import empty_head, replace_heads, resize
from sit_jax.convert.config_json import Description, read_config_json
from sit_jax.convert.detect import Positions, Told, detect
from sit_jax.convert.fill import fill
from sit_jax.convert.original import Entry
from sit_jax.convert.other_files import read_npz, read_safetensors
from sit_jax.convert.run_weights import is_run, read_run
from sit_jax.convert.select import select_torch, strip_prefixes
from sit_jax.convert.settle import describe, likely_fields, settle
from sit_jax.convert.tensors import FileError, Tensors, check_total
from sit_jax.convert.weights import Weights
from sit_jax.errors import UserError
from sit_jax.export.folder import CONFIG, WEIGHTS
from sit_jax.export.preprocessing import check_about

Say = Callable[[str], None]

TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt")


def silent(line: str) -> None:
    """Says nothing."""


def read_weights(
    path: str | pathlib.Path,
    overrides: Mapping[str, Any] | None = None,
    options: Options | None = None,
    say: Say = silent,
) -> Weights:
    """Reads a model's weights and finds out which model they belong to.

    Args:
        path: A `.pth`, `.pt`, `.pth.tar`, `.safetensors` or `.npz` file, a model folder, or a run.
        overrides: Fields of the architecture that the tensors do not tell, such as `num_heads`; those of `options` if
            not given.
        options: What else is chosen.
        say: Is called with each line about what was found and changed.

    Returns:
        The weights: NumPy float32 in Linen's names and layouts.

    Raises:
        UserError: One line that names the file and says what is wrong with it, or which option is missing.
    """
    path, options = pathlib.Path(path), options or Options()
    if overrides is not None:
        options = options._replace(fields=overrides)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if is_run(path) and options.fields:
        words = ", ".join(f"--model.{name}" for name in options.fields)
        raise UserError(f"{path}: is a run, whose config.json says what its model is; leave {words} out")
    weights = read_run(path, options.ema, options.reverse, say) if is_run(path) else _read_file(path, options, say)
    if options.licence is not None:
        weights = weights._replace(about={**weights.about, "licence": options.licence})
    if options.num_classes is not None:
        weights = replace_heads(weights, options.num_classes, say)
    if options.image_size is not None:
        weights = resize(weights, options.image_size, say)
    return weights


def _read_file(path: pathlib.Path, options: Options, say: Say) -> Weights:
    file = path / WEIGHTS if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: is neither a run nor a model folder: there is no {CONFIG} with {WEIGHTS} in it")
    tensors = strip_prefixes(_tensors(file, options.ema, say))
    config = read_config_json(file.with_name(CONFIG))
    if config.unused:
        say(f"not used: {', '.join(config.unused)} in {file.with_name(CONFIG)}")
    try:
        told = detect({name: tensor.shape for name, tensor in tensors.items()}, _positions(config, options))
        absent = _absent_heads(told, options.num_classes)
        if absent:
            config = _without_classes(config)
        hints = likely_fields(told, options.like) if options.like else {}
        said = _said(config, told)
        settled = settle(told, {**hints, **said}, options.fields)
        arch = settled.arch
        say(f"found: {describe(told, settled, {*said, *options.fields}, hints)}")
        reverse = told.has_reverse and options.reverse
        if told.has_reverse and not reverse:
            say("changed: RTSMs left out")
        tree = fill(arch, tensors, told.layout, reverse, absent, lambda table: _progress(file, table))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name in absent:
        tree["params"][name] = empty_head(arch.dim, arch.num_classes)
        say(f"changed: there is no {name}, so it is zeros")
    about = dict(config.about)
    if not config.is_own:
        about = {"provenance": {"converted_from": path.name, "layout": told.layout.name}, **about}
    if told.layout.preprocessing is not None:
        about = {"preprocessing": told.layout.preprocessing, **about}
    check_about(about, arch.num_classes, file.with_name(CONFIG))
    return Weights(arch, tree["params"], tree.get("batch_stats", {}), tree.get("reverse", {}), about)


def _tensors(file: pathlib.Path, ema: bool, say: Say) -> Tensors:
    """The tensors of a file, by its suffix."""
    if not file.is_file():
        raise UserError(f"{file}: is no file")
    if ema and file.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{file}: --ema is for checkpoints of training programs, which hold weights and their average")
    try:
        if file.suffix == ".safetensors":
            tensors = read_safetensors(file)
        elif file.suffix == ".npz":
            return read_npz(file)
        elif file.suffix in TORCH_SUFFIXES:
            tensors = select_torch(file, ema, say)
        else:
            known = ", ".join((*TORCH_SUFFIXES, ".safetensors", ".npz"))
            raise UserError(f"{file}: {file.suffix or 'no suffix'} is no kind of weights; there are {known}")
        check_total(file, tensors, file.stat().st_size)
        return tensors
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror or error}") from None


def _absent_heads(told: Told, num_classes: int | None) -> tuple[str, ...]:
    """The heads that the file lacks and `num_classes` replaces; fills in the number of classes."""
    if "num_classes" in told.fields:
        return ()
    if num_classes is None:
        raise UserError("there is no head in it: give --num_classes")
    told.fields["num_classes"] = num_classes
    heads = {"head": True, "distillation_head": told.fields["distillation_token"], "aux_head": told.fields["aux_head"]}
    return tuple(name for name, wanted in heads.items() if wanted)


def _positions(config: Description, options: Options) -> Positions:
    """What is known about the positions; an option comes before the `config.json`."""
    if "image_size" in options.fields:
        return Positions(options.fields["image_size"])
    # What is interpolated to the size of `like` may be of any other one.
    likely = options.like.image_size if options.like is not None and options.image_size is None else None
    size = config.fields.get("image_size")
    return Positions(size, config.class_position, likely, f"model.image_size in {CONFIG}")


def _without_classes(config: Description) -> Description:
    """What a `config.json` says, but for the head that the file beside it lacks."""
    fields = {key: value for key, value in config.fields.items() if key != "num_classes"}
    about = {key: value for key, value in config.about.items() if key != "class_names"}
    return config._replace(fields=fields, about=about)


def _said(config: Description, told: Told) -> dict[str, Any]:
    """The fields that a `config.json` says."""
    heads = config.heads.get(told.fields["dim"])
    return {**({} if heads is None else {"num_heads": heads}), **config.fields}


def _progress(file: pathlib.Path, table: Iterable[Entry]) -> Iterable[Entry]:
    """A bar on a terminal, for what takes longer than a second."""
    return tqdm(
        table, desc=f"reading {file.name}", unit="tensor", delay=1, leave=False, disable=not sys.stderr.isatty()
    )
