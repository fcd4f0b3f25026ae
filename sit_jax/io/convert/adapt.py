"""Adapts weights to another resolution or number of classes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from sit_jax.io.model import Model
from sit_jax.models import HEADS

# Parameter of the cubic kernel, as in PyTorch's bicubic interpolation (Pillow and the antialiased one use -0.5).
_CUBIC = -0.75


def resize(model: Model, image_size: int | tuple[int, int], log: Callable[[str], None]) -> Model:
    """Returns the weights for another image size: positions are interpolated, except for the class token's.

    A student keeps the numbers of tokens that its slimming modules were trained with. Reverse modules recover a fixed
    grid and are removed. Raises a ConfigError if the patches do not fill that size, or the student keeps more tokens.
    """
    arch = model.vit
    changes: dict[str, Any] = {"image_size": image_size}
    if arch.is_slimmed:
        patches = dataclasses.replace(arch.without_slimming(), image_size=image_size).num_patches
        changes |= {"kept_tokens": (patches, *arch.token_counts[1:]), "keep_ratio": None}
        changes["kept_tokens_choices"] = tuple((patches, *kept[1:]) for kept in arch.kept_tokens_choices)
    new = dataclasses.replace(arch, **changes)
    if new.image_size == arch.image_size:
        return model
    variables, old_grid, new_grid = model.variables, *("x".join(map(str, x.grid)) for x in (arch, new))
    how = "rotary positions"
    if arch.positions == "learned":
        positions, first = model.params["positions"], int(arch.class_token)
        grid = interpolate(positions[0, first:].reshape(*arch.grid, arch.dim), new.grid)
        table = np.concatenate([positions[:, :first], grid.reshape(1, -1, arch.dim)], axis=1)
        variables = {**variables, "params": {**model.params, "positions": table}}
        how = f"positions interpolated from {old_grid} to {new_grid} (bicubic)"
    log(f"changed: {arch.image_size_text} to {new.image_size_text} px, {how}")
    if arch.is_slimmed:
        log(f"changed: tokens per stage are now {'/'.join(map(str, new.token_counts))}")
    if model.rtsm:
        log(f"changed: RTSMs left out, since they recover {old_grid} tokens")
    return dataclasses.replace(model, arch=new, variables=variables, rtsm={})


def interpolate(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolates a grid bicubically, (rows, columns, dim) -> (*size, dim), float32.

    Equals `torch.nn.functional.interpolate(mode='bicubic', align_corners=False)`, which DeiT, LV-ViT and the original
    use. Pixel centres are aligned, edges repeat, and there is no antialiasing when the grid shrinks.
    """
    down, across = (_cubic_matrix(old, new) for old, new in zip(grid.shape, size, strict=False))
    wide = np.einsum("ij,kl,jlc->ikc", down, across, grid.astype(np.float64), optimize=True)
    return np.ascontiguousarray(wide, np.float32)


def _cubic_matrix(old: int, new: int) -> np.ndarray:
    """Returns the weight of each old position in each new position, (new, old)."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), index), _cubic(np.abs(centres - first - tap)))
    return matrix


def _cubic(distance: np.ndarray) -> np.ndarray:
    a, d = _CUBIC, distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def without_head(model: Model) -> Model:
    """Returns the model without its heads and class names: a backbone, whose output is its features."""
    arch = dataclasses.replace(model.vit, num_classes=0, aux_head=False)
    params = {name: value for name, value in model.params.items() if name not in HEADS}
    metadata = {name: value for name, value in model.metadata.items() if name != "class_names"}
    return dataclasses.replace(model, arch=arch, variables={**model.variables, "params": params}, metadata=metadata)


def replace_heads(model: Model, num_classes: int, log: Callable[[str], None]) -> Model:
    """Returns the weights for another number of classes, with all heads set to zero; without heads for 0 classes."""
    arch = model.vit
    if num_classes == arch.num_classes:
        return model
    heads = sorted(HEADS & set(model.params)) or ["head"]
    wide = {name: arch.feature_dim if name == "head" else arch.dim for name in heads}
    fresh = {name: empty_head(dim, num_classes) for name, dim in wide.items()} if num_classes else {}
    how = "replaced by zeros" if num_classes else "left out"
    log(f"changed: {arch.num_classes} to {num_classes} classes, {' and '.join(heads)} {how}")
    kept = {name: value for name, value in model.params.items() if name not in heads}
    metadata = {key: value for key, value in model.metadata.items() if key != "class_names"}
    new = dataclasses.replace(arch, num_classes=num_classes)
    variables = {**model.variables, "params": {**kept, **fresh}}
    return dataclasses.replace(model, arch=new, variables=variables, metadata=metadata)


def empty_head(dim: int, num_classes: int) -> dict[str, np.ndarray]:
    """Returns a head of zeros, which predicts all classes with equal probability."""
    return {"kernel": np.zeros((dim, num_classes), np.float32), "bias": np.zeros(num_classes, np.float32)}
