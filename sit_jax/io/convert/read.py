"""Reads weights of PyTorch, safetensors and NumPy files, model folders and runs."""

import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sit_jax.config import JsonObject
from sit_jax.errors import UserError
from sit_jax.io.convert.adapt import empty_head
from sit_jax.io.convert.config_json import Description, read_config_json
from sit_jax.io.convert.infer_config import Inferred, Positions, infer
from sit_jax.io.convert.load_params import load_params
from sit_jax.io.convert.npz_file import read_npz
from sit_jax.io.convert.resolve_config import describe, likely_fields, resolve
from sit_jax.io.convert.safetensors_file import read_safetensors
from sit_jax.io.convert.tensors import FileError, Tensors, check_axes, strip_prefixes
from sit_jax.io.convert.torch_file import read_torch
from sit_jax.io.metadata import check_metadata
from sit_jax.io.model import Model
from sit_jax.io.model_folder import CONFIG, WEIGHTS
from sit_jax.io.suffixes import NPZ, SAFETENSORS, TORCH, suffix_of
from sit_jax.models.architecture import Architecture

Log = Callable[[str], None]

_READERS = {SAFETENSORS: read_safetensors, NPZ: read_npz}


class Options(NamedTuple):
    """How to read and change weights.

    `fields` are architecture fields that the tensors do not determine, and `name` (see `resolve_config.OPTIONS`); they
    take precedence over those of `like`. `image_size`, `num_classes` and `licence` replace the source's unless None.
    `ema` selects the moving average if there are both, `rtsm` also reads reverse modules if there are any.
    """

    fields: Mapping[str, Any] = {}
    image_size: int | None = None
    num_classes: int | None = None
    ema: bool = False
    rtsm: bool = True
    licence: str | None = None
    like: Architecture | None = None


def silent(line: str) -> None:
    """Ignores a line."""


def read_file(path: pathlib.Path, options: Options, log: Log = silent) -> Model:
    """Reads a file of weights, or a folder that contains one, and infers the architecture; see `read_weights`.

    The options `image_size`, `num_classes` (for a file with a head) and `licence` are not applied.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: is neither a run nor a model folder: it has neither checkpoints nor {WEIGHTS}")
    tensors, args = _tensors(file, options.ema, log)
    config = read_config_json(file.with_name(CONFIG))
    if config.unused:
        log(f"not used: {', '.join(config.unused)} in {file.with_name(CONFIG)}")
    try:
        tensors = strip_prefixes(tensors)
        inferred = infer({name: tensor.shape for name, tensor in tensors.items()}, _positions(config, options))
        absent = _absent_heads(inferred, options.num_classes)
        if absent:
            config = _without_classes(config)
        hints = likely_fields(inferred, options.like) if options.like else {}
        heads = config.heads.get(inferred.fields["dim"])
        said = {**({} if heads is None else {"num_heads": heads}), **_stages(inferred, args), **config.fields}
        resolved = resolve(inferred, {**hints, **said}, options.fields)
        arch = resolved.arch
        log(f"found: {describe(inferred, resolved, {*said, *options.fields}, hints)}")
        rtsm = inferred.has_rtsm and options.rtsm
        if inferred.has_rtsm and not rtsm:
            log("changed: RTSMs left out")
        tree = load_params(arch, tensors, inferred.layout, rtsm, absent, f"reading {file.name}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name in absent:
        tree["params"][name] = empty_head(arch.dim, arch.num_classes)
        log(f"changed: there is no {name}, so it is zeros")
    metadata: JsonObject = {}
    if not config.is_own:
        metadata["provenance"] = {"converted_from": path.name, "layout": inferred.layout.name}
    if inferred.layout.preprocessing is not None:
        metadata["preprocessing"] = inferred.layout.preprocessing
    metadata |= config.metadata
    check_metadata(metadata, arch.num_classes, file.with_name(CONFIG))
    rtsm = tree.pop("rtsm", {})
    return Model(arch, tree, metadata, rtsm, source=str(path))


def _stages(inferred: Inferred, args: JsonObject) -> JsonObject:
    """Returns the blocks per stage if a program's arguments have the blocks before which TokenReduction slims."""
    before = args.get("reduction_loc")
    if not isinstance(before, list) or [type(block) for block in before] != [int] * len(inferred.kept) or not before:
        return {}
    ends = [0, *before, inferred.fields["depth"]]
    return {"stage_blocks": tuple(later - earlier for earlier, later in itertools.pairwise(ends))}


def _tensors(file: pathlib.Path, ema: bool, log: Log) -> tuple[Tensors, JsonObject]:
    """Returns the tensors of a file, by its suffix, and the arguments of the program that wrote it, if any."""
    if not file.is_file():
        raise UserError(f"{file}: is not a file")
    suffix = suffix_of(file, (*TORCH, *_READERS))
    if ema and suffix not in TORCH:
        raise UserError(f"{file}: --ema is for checkpoints of training programs, which hold weights and their average")
    try:
        tensors, args = read_torch(file, ema, log) if suffix in TORCH else (_READERS[suffix](file), {})
        check_axes(file, tensors)
        return tensors, args
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror or error}") from None


def _absent_heads(inferred: Inferred, num_classes: int | None) -> tuple[str, ...]:
    """Returns the heads that the file lacks and `num_classes` replaces; sets the number of classes."""
    if "num_classes" in inferred.fields:
        return ()
    if num_classes is None:
        raise UserError("the file has no head: give --num_classes")
    fields = inferred.fields
    fields["num_classes"] = num_classes
    heads = {"head": True, "distillation_head": fields["distillation_token"], "aux_head": fields["aux_head"]}
    return tuple(name for name, wanted in heads.items() if wanted)


def _positions(config: Description, options: Options) -> Positions:
    """Returns what is known about the positions; options take precedence over the `config.json`."""
    if "image_size" in options.fields:
        return Positions(options.fields["image_size"])
    # Positions that are interpolated to the size of `like` may be of any other size.
    likely = options.like.image_size if options.like is not None and options.image_size is None else None
    size = config.fields.get("image_size")
    return Positions(size, config.class_position, likely, f"model.image_size in {CONFIG}")


def _without_classes(config: Description) -> Description:
    """Returns a description without the head, which the file of weights lacks."""
    fields = {key: value for key, value in config.fields.items() if key != "num_classes"}
    metadata = {key: value for key, value in config.metadata.items() if key != "class_names"}
    return config._replace(fields=fields, metadata=metadata)
