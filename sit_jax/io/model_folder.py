"""Model folders: `model.safetensors` with the names and layouts of the PyTorch original, and `config.json`."""

import dataclasses
import json
import pathlib
import shutil

from pydantic import TypeAdapter, ValidationError

from sit_jax.config import JsonObject
from sit_jax.errors import UserError
from sit_jax.io.atomic_write import atomic_create
from sit_jax.io.convert.layouts import ORIGINAL
from sit_jax.io.convert.load_params import load_params
from sit_jax.io.convert.safetensors_file import read_safetensors, write_safetensors
from sit_jax.io.convert.sit_names import state_dict
from sit_jax.io.metadata import check_metadata
from sit_jax.io.runs import read_object
from sit_jax.io.suffixes import suffix_of
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Params, Variables

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# PyTorch users need nothing but the folder.
TORCH_FILES = tuple(
    pathlib.Path(__file__).with_name("export") / name
    for name in ("torch_model.py", "torch_layers.py", "torch_distillation.py")
)
FORMAT, VERSION = "sit_jax", 1
# Entries of config.json that describe the file itself; all others are the model's `metadata`.
_OWN = ("format", "format_version", "architecture", "kept_tokens")

_ARCHITECTURE: TypeAdapter[Architecture] = TypeAdapter(Architecture)


def write_folder(
    path: pathlib.Path,
    arch: Architecture,
    variables: Variables,
    rtsm: Params,
    metadata: JsonObject,
    replace: bool = False,
) -> None:
    """Writes a model folder atomically, with a copy of the PyTorch module next to the weights.

    Without `rtsm`, the reverse modules, which only training needs, are left out. Raises a UserError if the folder
    exists and `replace` is not set, cannot be written, or has the suffix of a file.
    """
    suffix_of(path, ("",))
    with atomic_create(path, replace) as part:
        part.mkdir()
        write_safetensors(part / WEIGHTS, state_dict({**variables, "rtsm": rtsm}, arch))
        (part / CONFIG).write_text(json.dumps(describe(arch, metadata), indent=2) + "\n")
        for file in TORCH_FILES:
            shutil.copyfile(file, part / file.name)


def read_folder(path: pathlib.Path) -> tuple[Architecture, Variables, JsonObject, Params]:
    """Returns architecture, variables, metadata and reverse modules (empty if it has none) of a model folder.

    Raises a UserError if it is none or is damaged: a file is missing or truncated, the weights are of another
    architecture, a tensor is missing, unexpected or has another shape, or values are not finite.
    """
    arch, metadata = read_description(read_object(path / CONFIG), path / CONFIG)
    file = path / WEIGHTS
    tensors = read_safetensors(file)
    try:
        tree = load_params(arch, tensors, ORIGINAL, rtsm=any(name.startswith("rtsm.") for name in tensors))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    rtsm = tree.pop("rtsm", {})
    return arch, tree, metadata, rtsm


def is_model_folder(path: pathlib.Path) -> bool:
    """Returns whether a path is a model folder and not a run directory."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return "format" in read_object(path / CONFIG)
    except UserError:
        return (path / WEIGHTS).exists()


def describe(arch: Architecture, metadata: JsonObject) -> JsonObject:
    """Returns the description of a model as JSON values: the contents of `config.json`."""
    own = {"format": FORMAT, "format_version": VERSION, "architecture": dataclasses.asdict(arch)}
    return {**own, "kept_tokens": list(arch.token_counts), **metadata}


def read_description(values: JsonObject, where: object) -> tuple[Architecture, JsonObject]:
    """Returns the architecture and `metadata` that a description holds; the inverse of `describe`.

    Raises a UserError, whose message begins with `where`, if they are not valid or of a later version of the format.
    """
    if values.get("format") != FORMAT:
        raise UserError(f'{where}: describes no model of sit_jax: "format" is {values.get("format")!r}')
    version = values.get("format_version")
    if version != VERSION:
        raise UserError(f"{where}: is of version {version!r} of the format; this sit_jax reads version {VERSION}")
    try:
        arch = _ARCHITECTURE.validate_python(values.get("architecture"))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, ("architecture", *problem["loc"])))
        raise UserError(f"{where}: {field}: {problem['msg']}") from None
    kept, counts = values.get("kept_tokens"), list(arch.token_counts)
    if kept != counts:
        raise UserError(f"{where}: kept_tokens is {kept}, but the architecture gives {counts}")
    metadata = {name: value for name, value in values.items() if name not in _OWN}
    check_metadata(metadata, arch.num_classes, where)
    return arch, metadata
