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
from sit_jax.io.convert.layouts import Layout, Shapes, Source
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
    try:
        written = to_layout(state, found.layout, {name: tensor.shape for name, tensor in tensors.items()})
    except UserError as error:
        raise UserError(f"--like {like}: {error}") from None
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        value = tensor.read()
        if name in written:
            # What did not change keeps the digits that float32 does not have.
            same = written[name] == value.astype(np.float32)
            value = np.where(same, value, written[name].astype(value.dtype))
        arrays[found.names[name]] = value
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

    Raises:
        UserError: The layout adds tensors, and thus has no inverse.
    """
    found: dict[str, np.ndarray] = {}
    state = _fold_positions(state, layout, shapes)
    for key, value in state.items():
        source = layout.source(key)
        starts = np.cumsum([1, *(math.prod(shapes[name]) for name in source.names)])
        place = _places(source, shapes).ravel()
        for name, start, end in zip(source.names, starts, starts[1:], strict=False):
            mine = (place >= start) & (place < end)
            target = found.setdefault(name, np.zeros(shapes[name], np.float32)).reshape(-1)
            target[place[mine] - start] = value.ravel()[mine]
    for key, value in state.items():
        source = layout.source(key)
        if not np.array_equal(source.combine(*(found[name] for name in source.names)), value):
            raise UserError(f"{' and '.join(source.names)} are added in this layout, which cannot be written")
    return found


def _places(source: Source, shapes: Shapes) -> np.ndarray:
    """Returns where the elements of a tensor come from, counted through its source's tensors.

    They are counted from 1: 0 is an element that the layout does not store.
    """
    starts = np.cumsum([1, *(math.prod(shapes[name]) for name in source.names)])
    return source.combine(
        *(
            np.arange(start, end).reshape(shapes[name])
            for name, start, end in zip(source.names, starts, starts[1:], strict=False)
        )
    )


def _fold_positions(state: dict[str, np.ndarray], layout: Layout, shapes: Shapes) -> dict[str, np.ndarray]:
    """Adds the positions of class and distillation token to them where a layout does not store such positions."""
    state = dict(state)
    for token, positions in (("cls_token", "pos_embed"), ("dist_token", "dist_pos_embed")):
        if token in state and positions in state and not _places(layout.source(positions), shapes)[:, 0].any():
            state[token] = state[token] + state[positions][:, :1]
            state[positions] = np.concatenate([np.zeros_like(state[token]), state[positions][:, 1:]], axis=1)
    return state
