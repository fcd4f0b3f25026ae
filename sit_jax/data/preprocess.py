"""Prepares batches on the device: normalization, random erasing, mixing and label distributions.

uint8 images need a quarter of the transfer that float32 images need, and host cores are a loader's first bottleneck.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from sit_jax.data.config import AugmentConfig, DataConfig, InputSpec, MixConfig
from sit_jax.data.mixing import draw_mix, mix_images, mix_labels, soft_labels

# timm's random erasing: area fraction and aspect ratio (height over width) of an erased box.
_AREA = (0.02, 1 / 3)
_RATIO = (0.3, 1 / 0.3)
_ATTEMPTS = 10
# Sampling points per patch and axis; their mean is the patch's label (RoI align).
_SAMPLES = 2
# One stream per use of randomness. Keys are a function of (seed, stream, step), so checkpoints store none.
STREAMS = {"init": 0, "drop_path": 1, "erase": 2, "mix": 3}


def stream_key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """Returns the random key of a stream at a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS[stream]), step)


def prepare_batch(spec: InputSpec, batch: Mapping[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
    """Normalizes, erases and mixes images, and converts labels to distributions.

    `batch` has `image`, uint8 or already normalized float (batch, height, width, channels), and `label`, class indices
    (batch,) or distributions (batch, classes); with label maps also the arguments of `patch_labels`. The seed and
    `step`, the number of optimizer steps done, determine all random choices.

    Returns `image`, float32; `label` (batch, classes), zeros if labels are not used; with label maps `patch_label`
    (batch, patches, classes); with MixToken `token_mix` (batch, patches), True for patches that come from the partner
    image.
    """
    images, labels = batch["image"], batch["label"]
    if images.dtype == jnp.uint8:
        images = normalize(images, spec.data)
    if not spec.labels:
        labels = jnp.zeros((images.shape[0], spec.num_classes))
    elif labels.ndim == 1:
        labels = soft_labels(labels, spec.num_classes, spec.label_smoothing)
    if spec.augment.erase > 0:
        images = random_erasing(stream_key(spec.seed, "erase", step), images, spec.augment)
    prepared = {}
    key = stream_key(spec.seed, "mix", step)
    if spec.mix.mixup > 0 or spec.mix.cutmix > 0:
        mix = draw_mix(key, images.shape[0], images.shape[1], images.shape[2], spec.mix)
        images, labels = mix_images(images, mix), mix_labels(labels, mix)
    per_patch = None
    if spec.patch_labels:
        maps = (batch["map_classes"], batch["map_values"], batch["crop"], batch["flipped"])
        per_patch = patch_labels(*maps, spec.grid, spec.num_classes, spec.label_smoothing)
    if spec.mix.mix_token > 0:
        # One box on the grid of patch tokens for the whole batch (LV-ViT, section 3.3).
        box = MixConfig(cutmix=spec.mix.mix_token, probability=spec.mix.probability)
        mix = draw_mix(key, images.shape[0], *spec.grid, box)
        labels = mix_labels(labels, mix)
        prepared["token_mix"] = mix.inside.reshape(images.shape[0], -1)
        if per_patch is not None:
            per_patch = jnp.where(prepared["token_mix"][..., None], per_patch[::-1], per_patch)
    if per_patch is not None:
        prepared["patch_label"] = per_patch
    return {"image": images, "label": labels, **prepared}


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


def patch_labels(
    classes: Int[Array, "batch side side top"],
    values: Float[Array, "batch side side top"],
    crop: Float[Array, "batch 4"],
    flipped: Bool[Array, " batch"],
    grid: tuple[int, int],
    num_classes: int,
    smoothing: float = 0.0,
) -> Float[Array, "batch patches classes"]:
    """Returns a class distribution for every patch, in row-major order, of the `grid` of patches of a crop.

    This is the token labelling of LV-ViT ('All Tokens Matter', NeurIPS 2021), aligned with two small matrix products.
    `grid` has rows and columns. `classes` are the top classes at each position of the whole image, `values` their
    probabilities; the remaining probability is spread over all classes. `crop` is left, top, right, bottom as fractions
    of the image.
    """
    side = classes.shape[1]
    rest = (1.0 - values.sum(axis=-1, keepdims=True)) / num_classes
    dense = (jax.nn.one_hot(classes, num_classes) * values[..., None]).sum(axis=-2) + rest
    across = _alignment(crop[:, 0], crop[:, 2], side, grid[1])
    across = jnp.where(flipped[:, None, None], across[:, ::-1], across)
    down = _alignment(crop[:, 1], crop[:, 3], side, grid[0])
    labels = jnp.einsum("biy,bjx,byxc->bijc", down, across, dense)
    labels = labels.reshape(labels.shape[0], -1, num_classes)
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
