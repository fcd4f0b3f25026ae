"""Writes a model back into the layout of the weights that it came from."""

import json
import math
import pathlib
import shutil

import numpy as np

from sit_jax.config import JsonObject
from sit_jax.errors import UserError
from sit_jax.io.atomic_write import atomic_create
from sit_jax.io.convert.initial import differences
from sit_jax.io.convert.layouts import Layout, Shapes
from sit_jax.io.convert.read import SLIMMED, SLIMMING, Options, identify
from sit_jax.io.convert.safetensors_file import write_safetensors
from sit_jax.io.convert.sit_names import state_dict
from sit_jax.io.model import Model

_LARGEST = 2**20
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".h5", ".msgpack", ".onnx", ".index.json")


def save(dest: pathlib.Path, model: Model, like: pathlib.Path) -> None:
    """Writes a folder in the layout of the weights at `like`, which are of the same model without slimming.

    Tensors have the names, shapes and types of `like`; those that the model has not are copied, as are the small files
    beside them. A slimmed model's reducers are in `slimming.safetensors` and `slimming.json`; `sit_jax.load` reads all.

    Raises:
        UserError: `like` cannot be read or is of another model, or `dest` exists.
    """
    arch = model.vit
    file, tensors, _, found = identify(like, Options(like=arch, rtsm=False))
    problem = differences(found.arch, arch, SLIMMED)
    if problem:
        raise UserError(f"--like {like}: is of another model: {problem}")
    state = state_dict(model.variables, arch)
    own = {key: state.pop(key) for key in list(state) if key.startswith(("tsm.", "reducer."))}
    written = to_layout(state, found.layout, {name: tensor.shape for name, tensor in tensors.items()})
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        value = tensor.read()
        arrays[found.names[name]] = written[name].astype(value.dtype) if name in written else value
    with atomic_create(dest) as part:
        part.mkdir()
        write_safetensors(part / "model.safetensors", arrays, same_types=True)
        for other in sorted(file.parent.iterdir()) if like.is_dir() else ():
            if other.is_file() and other.stat().st_size < _LARGEST and not other.name.endswith(_WEIGHTS):
                shutil.copyfile(other, part / other.name)
        if arch.is_slimmed:
            fields: JsonObject = {key: getattr(arch, key) for key in SLIMMED}
            write_safetensors(part / SLIMMING, own)
            text = json.dumps({**fields, "token_counts": arch.token_counts}, indent=2)
            (part / SLIMMING).with_suffix(".json").write_text(text + "\n")


def to_layout(state: dict[str, np.ndarray], layout: Layout, shapes: Shapes) -> dict[str, np.ndarray]:
    """Returns the tensors of a layout that hold a state dict in the original's layout; the inverse of reading them.

    What a layout does to its tensors is followed on the positions of their elements, so that it needs no inverse.
    """
    found: dict[str, np.ndarray] = {}
    for key, value in state.items():
        source = layout.source(key)
        sizes = [math.prod(shapes[name]) for name in source.names]
        starts = np.cumsum([1, *sizes])
        # Elements are numbered from 1: a 0 is an element that the layout does not store.
        numbers = [
            np.arange(start, start + size).reshape(shapes[name])
            for name, start, size in zip(source.names, starts, sizes, strict=False)
        ]
        place = source.combine(*numbers).ravel()
        for name, start, size in zip(source.names, starts, sizes, strict=False):
            mine = (place >= start) & (place < start + size)
            target = found.setdefault(name, np.zeros(shapes[name], np.float32)).reshape(-1)
            target[place[mine] - start] = value.ravel()[mine]
    return found
