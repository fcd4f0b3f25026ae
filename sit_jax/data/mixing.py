"""Label smoothing, mixup, CutMix and MixToken; all on the device.

As in timm, each image is mixed with the image at the mirrored position of the batch. The labels are mixed by the exact
fraction of the pixels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sit_jax.data.config import MixConfig


class Mix(NamedTuple):
    """Mixing parameters of a batch.

    `weight` is the mixing weight (lambda) of each original image and label; the partner has the remaining weight. With
    CutMix, `inside` is True for the pixels (or patches) of the partner; otherwise all pixels are blended.
    """

    weight: Float[Array, " batch"]
    is_cutmix: Bool[Array, " batch"]
    inside: Bool[Array, "batch height width"]


def soft_labels(
    labels: Int[Array, " batch"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "batch classes"]:
    """Returns one-hot labels with the fraction `smoothing` spread evenly over all classes; zeros for a label of -1."""
    soft = jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes
    return jnp.where(labels[:, None] >= 0, soft, 0.0)


def draw_mix(key: Array, batch: int, height: int, width: int, config: MixConfig) -> Mix:
    """Draws whether, how and how much each image is mixed; `height` and `width` are in pixels, or in patches."""
    draws = {"batch": 1, "pair": -(-batch // 2), "element": batch}[config.mode]
    whether, which, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    mixes = jax.random.bernoulli(whether, config.probability, (draws,))
    if config.mixup > 0 and config.cutmix > 0:
        is_cutmix = jax.random.bernoulli(which, config.switch, (draws,))
    else:
        is_cutmix = jnp.full((draws,), config.cutmix > 0)
    by_mixup = jax.random.beta(mixup_key, config.mixup or 1.0, config.mixup or 1.0, (draws,))
    by_cutmix = jax.random.beta(cutmix_key, config.cutmix or 1.0, config.cutmix or 1.0, (draws,))
    inside = _cut_box(box_key, by_cutmix, height, width) & (mixes & is_cutmix)[:, None, None]
    # The box may be clipped at the edge of the image: use the area that is actually cut.
    weight = jnp.where(is_cutmix, 1.0 - inside.mean(axis=(1, 2), dtype=jnp.float32), by_mixup)
    weight = jnp.where(mixes, weight, 1.0)
    return Mix(*(_to_batch(x, batch, config.mode) for x in (weight, is_cutmix, inside)))


def mix_images(
    images: Float[Array, "batch height width channels"], mix: Mix
) -> Float[Array, "batch height width channels"]:
    """Returns the mixed images."""
    blended = jnp.broadcast_to(mix.weight[:, None, None], mix.inside.shape)
    own = jnp.where(mix.is_cutmix[:, None, None], 1.0 - mix.inside, blended)[..., None]
    return images * own + images[::-1] * (1.0 - own)


def mix_labels(labels: Float[Array, "batch classes"], mix: Mix) -> Float[Array, "batch classes"]:
    """Returns the mixed labels."""
    weight = mix.weight[:, None]
    return labels * weight + labels[::-1] * (1.0 - weight)


def _cut_box(key: Array, weight: Float[Array, " draws"], height: int, width: int) -> Bool[Array, "draws height width"]:
    """Returns masks of boxes of about `1 - weight` of the area; centres are uniform, boxes clipped at the edges."""
    side = jnp.sqrt(1.0 - weight)
    y_key, x_key = jax.random.split(key)
    masks = []
    for axis_key, length in ((y_key, height), (x_key, width)):
        half = (length * side).astype(jnp.int32) // 2
        centre = jax.random.randint(axis_key, weight.shape, 0, length)
        place = jnp.arange(length)[None, :]
        masks.append((place >= (centre - half)[:, None]) & (place < (centre + half)[:, None]))
    return masks[0][:, :, None] & masks[1][:, None, :]


def _to_batch(drawn: Array, batch: int, mode: str) -> Array:
    """Expands drawn values to one per image: one for all, one per pair (an image and its mirror), or one per image."""
    if mode == "batch":
        return jnp.broadcast_to(drawn, (batch, *drawn.shape[1:]))
    if mode == "pair":
        place = jnp.arange(batch)
        return drawn[jnp.minimum(place, batch - 1 - place)]
    return drawn
