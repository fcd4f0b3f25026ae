"""Labels as the loss takes them, and how the images of a batch are mixed with one another; all on the device.

Every image is mixed with the one at the mirrored place of the batch, as in timm; the labels follow the fraction of the
pixels exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sit_jax.data.config import MixConfig


class Mix(NamedTuple):
    """How a batch is mixed.

    Attributes:
        share: Of each image and label that stays; the rest is its partner's.
        is_cutmix: Whether `inside` says which pixels are the partner's; else all are blended.
        inside: True for the pixels (or patches) that are the partner's in cutmix.
    """

    share: Float[Array, " batch"]
    is_cutmix: Bool[Array, " batch"]
    inside: Bool[Array, "batch height width"]


def soft_labels(
    labels: Int[Array, " batch"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "batch classes"]:
    """Class indices as rows of probabilities, `smoothing` of which is spread evenly over all classes."""
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes


def draw_mix(key: Array, batch: int, height: int, width: int, config: MixConfig) -> Mix:
    """Draws whether, how and how much each image of a batch is mixed.

    Args:
        key: Random key.
        batch: Images.
        height: Of the images (or of the grid of patches).
        width: Of the images.
        config: Probabilities and mode.
    """
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
    # The box may be clipped by the image's edge: what counts is the area that is really cut.
    share = jnp.where(is_cutmix, 1.0 - inside.mean(axis=(1, 2), dtype=jnp.float32), by_mixup)
    share = jnp.where(mixes, share, 1.0)
    return Mix(*(_to_batch(x, batch, config.mode) for x in (share, is_cutmix, inside)))


def mix_images(
    images: Float[Array, "batch height width channels"], mix: Mix
) -> Float[Array, "batch height width channels"]:
    """The mixed images."""
    blended = jnp.broadcast_to(mix.share[:, None, None], mix.inside.shape)
    own = jnp.where(mix.is_cutmix[:, None, None], 1.0 - mix.inside, blended)[..., None]
    return images * own + images[::-1] * (1.0 - own)


def mix_labels(labels: Float[Array, "batch classes"], mix: Mix) -> Float[Array, "batch classes"]:
    """The mixed labels."""
    share = mix.share[:, None]
    return labels * share + labels[::-1] * (1.0 - share)


def draw_token_mix(key: Array, batch: int, grid: int, config: MixConfig) -> Mix:
    """MixToken: one box on the grid of patch tokens for the whole batch (LV-ViT, section 3.3)."""
    as_cutmix = MixConfig(cutmix=config.mix_token, probability=config.probability)
    return draw_mix(key, batch, grid, grid, as_cutmix)


def _cut_box(key: Array, share: Float[Array, " draws"], height: int, width: int) -> Bool[Array, "draws height width"]:
    """True inside a box of about `1 - share` of the area, its centre uniform in the image, clipped at the edges."""
    side = jnp.sqrt(1.0 - share)
    y_key, x_key = jax.random.split(key)
    masks = []
    for axis_key, length in ((y_key, height), (x_key, width)):
        half = (length * side).astype(jnp.int32) // 2
        centre = jax.random.randint(axis_key, share.shape, 0, length)
        place = jnp.arange(length)[None, :]
        masks.append((place >= (centre - half)[:, None]) & (place < (centre + half)[:, None]))
    return masks[0][:, :, None] & masks[1][:, None, :]


def _to_batch(drawn: Array, batch: int, mode: str) -> Array:
    """One value per image: the only one, that of its pair (an image and its mirrored one), or its own."""
    if mode == "batch":
        return jnp.broadcast_to(drawn, (batch, *drawn.shape[1:]))
    if mode == "pair":
        place = jnp.arange(batch)
        return drawn[jnp.minimum(place, batch - 1 - place)]
    return drawn
