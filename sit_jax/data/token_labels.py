"""Token labelling: converts a label map to a soft label per patch of the cropped image.

Reference: 'All Tokens Matter: Token Labeling for Training Better Vision Transformers' (LV-ViT, NeurIPS 2021). The
    region is aligned on the device, with two small matrix products per image.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Sampling points per patch and axis; their mean is the patch's label (RoI align).
_SAMPLES = 2


def patch_labels(
    classes: Int[Array, "batch side side top"],
    values: Float[Array, "batch side side top"],
    crop: Float[Array, "batch 4"],
    flipped: Bool[Array, " batch"],
    grid: int,
    num_classes: int,
    smoothing: float = 0.0,
) -> Float[Array, "batch patches classes"]:
    """Returns a class distribution for every patch, in row-major order, of the `grid` x `grid` patches of a crop.

    `classes` are the top classes at each position of the whole image, `values` their probabilities; the remaining
    probability is spread over all classes. `crop` is left, top, right, bottom as fractions of the image.
    """
    side = classes.shape[1]
    rest = (1.0 - values.sum(axis=-1, keepdims=True)) / num_classes
    dense = (jax.nn.one_hot(classes, num_classes) * values[..., None]).sum(axis=-2) + rest
    across = _alignment(crop[:, 0], crop[:, 2], side, grid)
    across = jnp.where(flipped[:, None, None], across[:, ::-1], across)
    down = _alignment(crop[:, 1], crop[:, 3], side, grid)
    labels = jnp.einsum("biy,bjx,byxc->bijc", down, across, dense)
    labels = labels.reshape(labels.shape[0], grid * grid, num_classes)
    return labels * (1.0 - smoothing) + smoothing / num_classes


def _alignment(
    start: Float[Array, " batch"], stop: Float[Array, " batch"], side: int, grid: int
) -> Float[Array, "batch grid side"]:
    """Returns the weights of the map's positions along one axis for each patch: averaged bilinear samples."""
    points = (jnp.arange(grid * _SAMPLES) + 0.5) / (grid * _SAMPLES)
    # Position k of the map covers [k, k + 1); its value is at the centre.
    where = (start[:, None] + points[None, :] * (stop - start)[:, None]) * side - 0.5
    where = jnp.clip(where, 0.0, side - 1.0)
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(where[..., None] - jnp.arange(side)[None, None, :]))
    return weights.reshape(-1, grid, _SAMPLES, side).mean(axis=2)
