"""Normalization and random erasing of a batch, on the device.

uint8 images need a quarter of the transfer that float32 images need, and host cores are a loader's first bottleneck.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from sit_jax.data.config import AugmentConfig, DataConfig

# timm's random erasing: area fraction and aspect ratio (height over width) of an erased box.
_AREA = (0.02, 1 / 3)
_RATIO = (0.3, 1 / 0.3)
_ATTEMPTS = 10


def normalize(
    images: UInt8[Array, "batch height width channels"], data: DataConfig
) -> Float[Array, "batch height width channels"]:
    """Returns float32 images, normalized with `data.mean` and `data.std` (averaged over channels for grey images)."""
    mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)
    if images.shape[-1] == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    shape = (1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255.0 - mean.reshape(shape)) / std.reshape(shape)


def random_erasing(
    key: Array, images: Float[Array, "batch height width channels"], augment: AugmentConfig
) -> Float[Array, "batch height width channels"]:
    """Erases random boxes of normalized images, independently for each image, by timm's rules.

    An image is erased with probability `augment.erase`: one box, or 1 to `erase_count` boxes that share the area. The
    fill is normal noise per pixel (`pixel`) or per box and channel (`rand`), or 0, the mean colour (`const`).
    """
    batch, height, width, channels = images.shape
    whether, how_many, boxes, noise = jax.random.split(key, 4)
    count = jax.random.randint(how_many, (batch,), 1, augment.erase_count + 1)
    count = jnp.where(jax.random.bernoulli(whether, augment.erase, (batch,)), count, 0)
    for index, box_key in enumerate(jax.random.split(boxes, augment.erase_count)):
        inside = _box_mask(box_key, count, height, width) & (index < count)[:, None, None]
        fill_key = jax.random.fold_in(noise, index)
        if augment.erase_mode == "pixel":
            fill = jax.random.normal(fill_key, images.shape)
        elif augment.erase_mode == "rand":
            fill = jax.random.normal(fill_key, (batch, 1, 1, channels))
        else:
            fill = jnp.zeros((1, 1, 1, channels))
        images = jnp.where(inside[..., None], fill, images)
    return images


def _box_mask(
    key: Array, count: Float[Array, " batch"] | Array, height: int, width: int
) -> Bool[Array, "batch height width"]:
    """Returns masks of one random box per image: the first of ten drawn boxes that fits; empty if none fits."""
    batch = count.shape[0]
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    shape = (batch, _ATTEMPTS)
    fraction = jax.random.uniform(area_key, shape, minval=_AREA[0], maxval=_AREA[1])
    area = fraction * height * width / jnp.maximum(count, 1)[:, None]
    low, high = jnp.log(_RATIO[0]), jnp.log(_RATIO[1])
    ratio = jnp.exp(jax.random.uniform(ratio_key, shape, minval=low, maxval=high))
    tall, wide = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (tall < height) & (wide < width)
    first = fits.argmax(axis=1)[:, None]
    tall, wide = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (tall, wide))
    # Uniform over all integer positions at which the box is inside the image.
    top = jnp.floor(jax.random.uniform(top_key, (batch,)) * (height - tall + 1))
    left = jnp.floor(jax.random.uniform(left_key, (batch,)) * (width - wide + 1))
    rows, columns = jnp.arange(height)[None, :], jnp.arange(width)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :] & fits.any(axis=1)[:, None, None]
