"""Implementation of `sit export`: converts a run or a model folder to a deployment format."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Array

from sit_jax.data.preprocess import normalize
from sit_jax.errors import UserError
from sit_jax.io.atomic_write import atomic_create
from sit_jax.io.convert.safetensors_file import write_safetensors
from sit_jax.io.convert.sit_names import to_original
from sit_jax.io.convert.torch_file import require_torch, write_torch
from sit_jax.io.export import onnx_file, stablehlo
from sit_jax.io.export.timm import to_timm
from sit_jax.io.inference import inference_model
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.io.model_folder import describe

Format = Literal["folder", "onnx", "stablehlo", "original", "timm"]
_STATE_DICT = (".safetensors", ".pth")
_SUFFIXES = {
    "onnx": (onnx_file.SUFFIX,),
    "stablehlo": (stablehlo.SUFFIX,),
    "original": _STATE_DICT,
    "timm": _STATE_DICT,
}


def export_model(
    source: pathlib.Path,
    dest: pathlib.Path,
    kind: Format,
    ema: bool = False,
    step: int | None = None,
    with_rtsm: bool = False,
    dtype: onnx_file.Dtype = "float32",
    raw_input: bool = False,
    licence: str | None = None,
) -> None:
    """Writes a run or a model folder in another format, atomically; the options are those of `sit export`.

    Raises a UserError if the source cannot be read, the destination exists or cannot be written, or an option does not
    apply to the format.
    """
    wanted = _SUFFIXES.get(kind)
    if wanted and dest.suffix not in wanted:
        raise UserError(f"{dest}: the name of a file of format {kind} must end in {' or '.join(wanted)}")
    if with_rtsm and kind not in ("folder", "original"):
        raise UserError(f"--with_rtsm: only training needs reverse modules; {kind} does not hold them")
    if dtype != "float32" and kind != "onnx":
        raise UserError(f"--dtype: {kind} is always float32; only onnx can be {dtype}")
    if raw_input and kind not in ("onnx", "stablehlo"):
        raise UserError(f"--raw_input: {kind} holds weights, not a function; it is for onnx and stablehlo")
    if licence is not None and kind in ("original", "timm"):
        raise UserError(f"--licence: {kind} holds tensors only; folder, onnx and stablehlo say what their licence is")
    model = load(source, ema=ema, step=step, with_rtsm=with_rtsm)
    arch = model.vit
    if licence is not None:
        model = dataclasses.replace(model, metadata={**model.metadata, "licence": licence})
    if kind == "folder":
        model.save(dest, with_rtsm)
    elif kind == "onnx":
        onnx_file.save(dest, model, dtype, raw_input)
    elif kind == "stablehlo":
        description = {**describe(arch, model.metadata), "input": "pixels" if raw_input else "images"}
        shape = (arch.image_size, arch.image_size, arch.in_channels)
        stablehlo.save(dest, _forward(model, raw_input), shape, description)
    elif kind == "original":
        tree = {**model.variables, "rtsm": model.rtsm if with_rtsm else {}}
        _save_state_dict(dest, to_original(tree, arch))
    else:
        _save_state_dict(dest, to_timm(model))


def _forward(model: Model, raw_input: bool) -> Callable[[Array], Array]:
    """Returns the function from uint8 pixels, or else from normalized images, to logits, including its weights."""
    # Unlike `auto`, which depends on this machine, for any platform.
    prepared = inference_model(model.arch, model.variables, attention="plain")
    return lambda images: prepared.apply(prepared.weights, normalize(images, model.data) if raw_input else images)


def _save_state_dict(dest: pathlib.Path, state_dict: dict[str, np.ndarray]) -> None:
    """Writes a state dict as safetensors, or as a PyTorch file if the suffix is PyTorch's."""
    as_torch = dest.suffix != ".safetensors"
    if as_torch:
        require_torch(dest)
    with atomic_create(dest) as part:
        if as_torch:
            write_torch(part, state_dict)
        else:
            write_safetensors(part, {name: array.shape for name, array in state_dict.items()}, state_dict.values())
