"""Reads weights of PyTorch, safetensors and NumPy files, model folders and runs."""

import contextlib
import dataclasses
import itertools
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sit_jax.config import JsonObject
from sit_jax.data.formats import ZIP
from sit_jax.errors import ConfigError, UserError, listed
from sit_jax.io.convert import hugging_face
from sit_jax.io.convert.adapt import empty_head
from sit_jax.io.convert.batch_counters import read_counters
from sit_jax.io.convert.config_json import Description, read_config_json
from sit_jax.io.convert.infer_config import Inferred, Positions, infer
from sit_jax.io.convert.layouts import Layout
from sit_jax.io.convert.load_params import load_params
from sit_jax.io.convert.npz_file import read_npz
from sit_jax.io.convert.resolve_config import describe, likely_fields, resolve
from sit_jax.io.convert.safetensors_file import read_safetensors, read_sharded
from sit_jax.io.convert.tensors import FileError, Tensors, check_axes, strip_prefixes
from sit_jax.io.convert.torch_file import read_torch
from sit_jax.io.metadata import check_metadata
from sit_jax.io.model import Model
from sit_jax.io.model_folder import CONFIG, WEIGHTS
from sit_jax.io.runs import read_object
from sit_jax.io.suffixes import NPZ, SAFETENSORS, TORCH, suffix_of
from sit_jax.models.architecture import Architecture

Log = Callable[[str], None]

_READERS = {SAFETENSORS: read_safetensors, NPZ: read_npz}


# Parts of the pre-training of MAE, DINOv2 and DINOv3, CLIP's text tower, and what is computed from other values.
_UNUSED = re.compile(
    r"mask_token$|decoder_|rope_embed\.periods$|(dino|ibot)_head\.|.*\.qkv\.bias_mask$|logit_scale$|logit_bias$"
    r"|text_projection|token_embedding\.|ln_final\.|text\.|(input_resolution|context_length|vocab_size)$"
    r"|params/(txt/|[tb]$)"
)
# Names of CLIP's text tower that are those of the vision tower without its prefix.
_TEXT = re.compile(r"transformer\.resblocks\.|positional_embedding$")


# Beside weights in another program's layout: the reducers of the slimmed model, and their fields in a JSON file.
SLIMMING = "slimming.safetensors"
SLIMMED = ("stage_blocks", "keep_ratio", "kept_tokens", "kept_tokens_choices", "reducer")


class Options(NamedTuple):
    """How to read and change weights.

    `fields` are architecture fields that the tensors do not determine, and `name` (see `resolve_config.OPTIONS`); they
    take precedence over those of `like`. `image_size`, `num_classes` and `licence` replace the source's unless None.
    `ema` selects the moving average if there are both, `key` one of several models. `rtsm` also reads reverse modules
    if there are any.
    """

    fields: Mapping[str, Any] = {}
    image_size: int | tuple[int, int] | None = None
    num_classes: int | None = None
    ema: bool = False
    rtsm: bool = True
    licence: str | None = None
    like: Architecture | None = None
    key: str = ""


def silent(line: str) -> None:
    """Ignores a line."""


def read_file(path: pathlib.Path, options: Options, log: Log = silent) -> Model:
    """Reads a file of weights, or a folder that contains one, and infers the architecture; see `read_weights`.

    The options `image_size`, `num_classes` (for a file with a head) and `licence` are not applied.
    """
    file, tensors, config, found = identify(path, options, log)
    arch, layout = found.arch, found.layout
    rtsm = found.has_rtsm and options.rtsm
    if found.has_rtsm and not rtsm:
        log("changed: RTSMs left out")
    used = {name: tensor for name, tensor in tensors.items() if name not in found.unused}
    try:
        tree = load_params(arch, used, layout, rtsm, found.absent, f"reading {file.name}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name in found.absent:
        tree["params"][name] = empty_head(arch.feature_dim if name == "head" else arch.dim, arch.num_classes)
        log(f"changed: there is no {name}, so it is zeros")
    metadata: JsonObject = {}
    if not config.is_own:
        metadata["provenance"] = {"converted_from": path.name, "layout": layout.name}
    if layout.preprocessing is not None:
        metadata["preprocessing"] = layout.preprocessing
    metadata |= {**read_counters(tensors), **config.metadata}
    if found.absent or not arch.num_classes:
        metadata.pop("class_names", None)
    check_metadata(metadata, arch.num_classes, file.with_name(CONFIG))
    rtsm = tree.pop("rtsm", {})
    return Model(arch, tree, metadata, rtsm, source=str(path))


def identify(
    path: pathlib.Path, options: Options, log: Log = silent
) -> tuple[pathlib.Path, Tensors, Description, "Identified"]:
    """Returns the file of weights at a path, its tensors, the description beside it, and the model that it holds.

    Raises:
        UserError: As `read_weights`.
    """
    file = _weights_file(path) if path.is_dir() else path
    tensors, args = _tensors(file, options, log)
    config = read_config_json(file.with_name(CONFIG))
    if config.unused:
        log(f"not used: {', '.join(config.unused)} in {file.with_name(CONFIG)}")
    try:
        stripped = strip_prefixes(tensors)
        names = dict(zip(stripped, tensors, strict=True))
        tensors = stripped
        is_hub = config.hugging_face is not None and hugging_face.is_known_layout(tensors)
        look = _identify_hugging_face if is_hub else _identify
        found = look(tensors, config, args, options, log)
        slim = file.with_name(SLIMMING)
        if slim.with_suffix(".json").is_file():
            tensors |= read_safetensors(slim)
            given = read_object(slim.with_suffix(".json"))
            fields: JsonObject = {
                key: tuple(x) if isinstance(x, list) else x for key, x in given.items() if key in SLIMMED
            }
            found = found._replace(arch=dataclasses.replace(found.arch, **fields))
            log(f"found: reducers, tokens per stage {'/'.join(map(str, found.arch.token_counts))}")
    except UserError as error:
        by_config = config.hugging_face is not None and isinstance(error, ConfigError)
        raise UserError(f"{file.with_name(CONFIG) if by_config else path}: {error}") from None
    return file, tensors, config, found._replace(names=names)


class Identified(NamedTuple):
    """The model of a file.

    `absent` are heads that the file lacks, `unused` tensors that the model does not need. `names` maps tensors whose
    names had a prefix to their names in the file.
    """

    arch: Architecture
    layout: Layout
    has_rtsm: bool
    absent: tuple[str, ...]
    unused: tuple[str, ...] = ()
    names: Mapping[str, str] = {}


def _identify(tensors: Tensors, config: Description, args: JsonObject, options: Options, log: Log) -> Identified:
    """Infers the model from the tensors, and what they do not determine from the description and the options."""
    inferred = infer({name: tensor.shape for name, tensor in tensors.items()}, _positions(config, options))
    absent = _absent_heads(inferred, options.num_classes)
    fields = {key: value for key, value in config.fields.items() if not (absent and key == "num_classes")}
    if inferred.fields["mlp"] == "swiglu":
        fields.pop("mlp_ratio", None)  # timm counts both halves of the hidden units; the tensors tell.
    hints = likely_fields(inferred, options.like) if options.like else {}
    heads = config.heads.get(inferred.fields["dim"])
    said = {**({} if heads is None else {"num_heads": heads}), **_stages(inferred, args), **fields}
    resolved = resolve(inferred, {**hints, **said}, options.fields)
    log(f"found: {describe(inferred, resolved, {*said, *options.fields}, hints)}")
    has_text = any(name.startswith("visual.") for name in tensors)
    unused = tuple(name for name in tensors if _UNUSED.match(name) or (has_text and _TEXT.match(name)))
    if unused:
        log(f"not used: {listed(unused)}")
    return Identified(resolved.arch, inferred.layout, inferred.has_rtsm, absent, unused)


def _identify_hugging_face(
    tensors: Tensors, config: Description, args: JsonObject, options: Options, log: Log
) -> Identified:
    """Returns the model that the `config.json` of transformers describes; no option changes it."""
    del args
    if options.fields:
        raise ConfigError(f"model.{next(iter(options.fields))}", f"is determined by {CONFIG}; leave it out")
    found = hugging_face.find(config.hugging_face or {}, {name: tensor.shape for name, tensor in tensors.items()})
    arch = found.arch
    absent: tuple[str, ...] = ()
    if options.num_classes and not arch.num_classes:
        arch, absent = dataclasses.replace(arch, num_classes=options.num_classes), ("head",)
    head = f"{arch.num_classes} classes" if arch.num_classes else f"no head, features of width {arch.feature_dim}"
    log(f"found: {found.layout.name}, width {arch.dim}, depth {arch.depth}, {arch.image_size_text} px, {head}")
    if found.unused:
        parts = sorted({name.split(".")[0] if "_token" not in name else name.split(".")[-1] for name in found.unused})
        log(f"not used: {len(found.unused)} tensors, of {', '.join(parts)}")
    return Identified(arch, found.layout, False, absent, found.unused)


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file of a folder that holds the weights, or the index of its shards."""
    for name in (WEIGHTS, f"{WEIGHTS}.index.json", "open_clip_model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: is neither a run nor a model folder: it has neither checkpoints nor {WEIGHTS}")


def _stages(inferred: Inferred, args: JsonObject) -> JsonObject:
    """Returns the blocks per stage if a program's arguments have the blocks before which TokenReduction slims."""
    before = args.get("reduction_loc")
    if not isinstance(before, list) or [type(block) for block in before] != [int] * len(inferred.kept) or not before:
        return {}
    ends = [0, *before, inferred.fields["depth"]]
    return {"stage_blocks": tuple(later - earlier for earlier, later in itertools.pairwise(ends))}


def _tensors(file: pathlib.Path, options: Options, log: Log) -> tuple[Tensors, JsonObject]:
    """Returns the tensors of a file, by its content, and the arguments of the program that wrote it, if any."""
    if not file.is_file():
        raise UserError(f"{file}: is not a file")
    args: JsonObject = {}
    try:
        kind = file.name if file.name.endswith(".index.json") else _kind(file)
        if options.ema and kind not in TORCH:
            raise UserError(f"{file}: --ema is for checkpoints of programs, which hold weights and their average")
        if kind in TORCH:
            tensors, args = read_torch(file, options.ema, log, options.key)
        else:
            tensors = read_sharded(file) if kind == file.name else _READERS[kind](file)
            if options.key:
                tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{options.key}.")}
        check_axes(file, tensors)
        return tensors, args
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror or error}") from None


def _kind(file: pathlib.Path) -> str:
    """Returns the suffix of a file's format, by its first bytes: files of weights have all kinds of names."""
    with file.open("rb") as opened:
        first = opened.read(9)
    if first[8:] == b"{" and int.from_bytes(first[:8], "little") < file.stat().st_size:
        return SAFETENSORS
    if first[:1] == b"\x80":
        return TORCH[0]
    if first[:4] == ZIP:
        with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(file) as archive:
            return NPZ if all(name.endswith(".npy") for name in archive.namelist()) else TORCH[0]
    return suffix_of(file, (*TORCH, *_READERS))


def _absent_heads(inferred: Inferred, num_classes: int | None) -> tuple[str, ...]:
    """Returns the heads that the file lacks and `num_classes` replaces; sets the number of classes, 0 without head."""
    if "num_classes" in inferred.fields:
        return ()
    fields = inferred.fields
    fields["num_classes"] = num_classes or 0
    if not num_classes:
        return ()
    heads = {"head": True, "distillation_head": fields["distillation_token"], "aux_head": fields["aux_head"]}
    return tuple(name for name, wanted in heads.items() if wanted)


def _positions(config: Description, options: Options) -> Positions:
    """Returns what is known about the positions; options take precedence over the `config.json`."""
    if "image_size" in options.fields:
        return Positions(options.fields["image_size"])
    # Positions that are interpolated to the size of `like` may be of any other size.
    likely = options.like.image_size if options.like is not None and options.image_size is None else None
    size = config.fields.get("image_size")
    positions = config.fields.get("positions", "learned")
    return Positions(size, config.class_position, likely, f"model.image_size in {CONFIG}", positions)
