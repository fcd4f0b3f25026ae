"""Implementation of `sit export`: converts a run or a model folder to a deployment format."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array

from sit_jax.data.preprocess import normalize
from sit_jax.errors import UserError
from sit_jax.io.convert.adapt import without_head
from sit_jax.io.convert.convert import original_state, write_state_dict
from sit_jax.io.convert.sit_names import to_original
from sit_jax.io.export import onnx_file, source_layout, stablehlo
from sit_jax.io.inference import features_model, inference_model
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.io.model_folder import describe
from sit_jax.io.suffixes import ONNX, SAFETENSORS, STABLEHLO, suffix_of
from sit_jax.models.features import Grid

Format = Literal["folder", "onnx", "stablehlo", "original", "timm", "source"]
_STATE_DICT = (SAFETENSORS, ".pth")
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    **{"folder": ("",), "onnx": (ONNX,), "stablehlo": (STABLEHLO,)},
    **{"original": _STATE_DICT, "timm": _STATE_DICT, "source": ("",)},
}
_TIMM_NORM_EPS = 1e-6
# Fields of timm's plain model: other values have other tensors, or change what no tensor stores.
_TIMM_FIELDS = {
    **{"class_token": True, "registers": 0, "positions": "learned", "pre_norm": False, "mlp": "plain"},
    **{"activation": "gelu", "key_bias": True, "pool": "token", "projection": 0, "patch_bias": True},
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
    like: pathlib.Path | None = None,
    features: bool = False,
    grid: Grid | None = None,
    kept_tokens: Sequence[int] = (),
) -> None:
    """Writes a run or a model folder in another format, atomically; the options are those of `sit export`.

    Raises a UserError if the source cannot be read, the destination exists or cannot be written, or an option does not
    apply to the format.
    """
    suffix_of(dest, _SUFFIXES[kind])
    if with_rtsm and kind not in ("folder", "original"):
        raise UserError(f"--with_rtsm: only training needs reverse modules; {kind} does not hold them")
    if dtype != "float32" and kind != "onnx":
        raise UserError(f"--dtype: {kind} is always float32; only onnx can be {dtype}")
    if raw_input and kind not in ("onnx", "stablehlo"):
        raise UserError(f"--raw_input: {kind} holds weights, not a function; it is for onnx and stablehlo")
    if licence is not None and kind in ("original", "timm", "source"):
        raise UserError(f"--licence: {kind} holds tensors only; folder, onnx and stablehlo say what their licence is")
    if features and kind not in ("folder", "onnx", "stablehlo"):
        raise UserError(f"--features: {kind} is the layout of a whole model; it is for folder, onnx and stablehlo")
    if grid is not None and kind not in ("onnx", "stablehlo"):
        raise UserError(f"--grid: {kind} holds weights, not a function; it is for onnx and stablehlo")
    if (like is None) == (kind == "source"):
        raise UserError("--like: names the weights whose layout --format source writes, and no other format")
    model = load(source, ema, step, with_rtsm or grid == "rtsm", kept_tokens)
    model = without_head(model) if features else model
    arch = model.vit
    if grid is not None and (arch.num_classes or not arch.is_slimmed):
        raise UserError("--grid: is for the patch tokens of a slimmed model without a head; give --features")
    if licence is not None:
        model = dataclasses.replace(model, metadata={**model.metadata, "licence": licence})
    if kind == "folder":
        model.save(dest, with_rtsm)
    elif kind == "onnx":
        onnx_file.save(dest, model, dtype, raw_input, grid)
    elif kind == "stablehlo":
        description = {**describe(arch, model.metadata), "input": "pixels" if raw_input else "images"}
        shape = (*arch.image_shape, arch.in_channels)
        stablehlo.save(dest, _forward(model, raw_input, grid), shape, description)
    elif kind == "original":
        write_state_dict(dest, original_state(model, model.rtsm if with_rtsm else {}))
    elif like is not None:
        source_layout.save(dest, model, like)
    else:
        write_state_dict(dest, _to_timm(model))


def _forward(model: Model, raw_input: bool, grid: Grid | None) -> Callable[[Array], Any]:
    """Returns the function from uint8 pixels, or else from normalized images, to logits or, without a head, features.

    It includes the weights.
    """
    # Unlike `auto`, which depends on this machine, for any platform.
    arch, how = model.vit, {"attention": "plain"}
    if arch.num_classes:
        prepared = inference_model(arch, model.variables, **how)
    else:
        prepared = features_model(arch, model.variables, **how, grid=grid, rtsm=model.rtsm)

    def forward(images: Array) -> Any:
        found = prepared.apply(prepared.weights, normalize(images, model.data) if raw_input else images)
        return found if arch.num_classes else found._asdict()

    return forward


def _to_timm(model: Model) -> dict[str, np.ndarray]:
    """Returns a plain ViT's weights as timm's state dict.

    With a distillation token the layout is that of timm's `VisionTransformerDistilled`. The names are the original's,
    except for the distillation token's position, which is stored with the other positions. Raises a UserError if timm
    has no such model; an epsilon of LayerNorms that timm's models do not have would be lost, since no tensor stores it.
    """
    arch = model.vit
    differences = {
        "is slimmed": arch.is_slimmed,
        f"has a {arch.stem} stem": arch.stem != "patch",
        f"divides its residual branches by {arch.residual_scale:g}": arch.residual_scale != 1,
        f"has norm_eps {arch.norm_eps:g} (timm's is {_TIMM_NORM_EPS:g})": arch.norm_eps != _TIMM_NORM_EPS,
        **{f"has {key}={getattr(arch, key)}": getattr(arch, key) != plain for key, plain in _TIMM_FIELDS.items()},
    }
    problems = [problem for problem, there in differences.items() if there]
    if problems:
        raise UserError(f"timm has plain vision transformers only, but this model {', '.join(problems)}")
    state_dict = to_original(model.variables, arch)
    if arch.aux_head:
        print("aux_head is left out: timm has none, and only token labelling uses it", file=sys.stderr)
        state_dict = {name: array for name, array in state_dict.items() if not name.startswith("aux_head.")}
    if arch.distillation_token:
        positions, own = state_dict["pos_embed"], state_dict.pop("dist_pos_embed")
        state_dict["pos_embed"] = np.concatenate([positions[:, :1], own, positions[:, 1:]], axis=1)
    return state_dict
