"""The training batch as the loss takes it, made from the loader's on the device; a pure function."""

from typing import Any

import jax
import jax.numpy as jnp

from sit_jax.config import Config
from sit_jax.data.mixing import draw_mix, draw_token_mix, mix_images, mix_labels, soft_labels
from sit_jax.data.preprocess import normalize, random_erasing
from sit_jax.data.token_labels import patch_labels
from sit_jax.state import stream_key


def prepare_batch(config: Config, batch: dict[str, Any], step: jax.Array) -> dict[str, jax.Array]:
    """Normalises, erases, mixes, and turns labels into distributions.

    Args:
        config: The run's configuration.
        batch: `image`, uint8 or already normalised float (batch, height, width, channels); `label`, class indices
            (batch,) or distributions (batch, classes); with label maps also `map_classes`, `map_values`, `crop`
            and `flipped` (see `token_labels.patch_labels`).
        step: Optimizer steps done; with the seed it decides every random choice.

    Returns:
        `image`, float32; `label` (batch, classes); with label maps `patch_label` (batch, patches, classes); with
        MixToken `token_mix`, True for patches that are the partner's, (batch, patches).
    """
    arch, mix_config, smoothing = config.model.architecture, config.mix, config.loss.label_smoothing
    images, labels = batch["image"], batch["label"]
    if images.dtype == jnp.uint8:
        images = normalize(images, config.data)
    if labels.ndim == 1:
        labels = soft_labels(labels, arch.num_classes, smoothing)
    if config.augment.erase > 0:
        images = random_erasing(stream_key(config.seed, "erase", step), images, config.augment)
    prepared: dict[str, jax.Array] = {}
    key = stream_key(config.seed, "mix", step)
    if mix_config.mixup > 0 or mix_config.cutmix > 0:
        mix = draw_mix(key, images.shape[0], images.shape[1], images.shape[2], mix_config)
        images, labels = mix_images(images, mix), mix_labels(labels, mix)
    per_patch = None
    if config.loss.token_label > 0:
        maps = (batch["map_classes"], batch["map_values"], batch["crop"], batch["flipped"])
        per_patch = patch_labels(*maps, config.grid_size, arch.num_classes, smoothing)
    if mix_config.mix_token > 0:
        mix = draw_token_mix(key, images.shape[0], config.grid_size, mix_config)
        labels = mix_labels(labels, mix)
        inside = mix.inside.reshape(images.shape[0], -1)
        prepared["token_mix"] = inside
        if per_patch is not None:
            per_patch = jnp.where(inside[..., None], per_patch[::-1], per_patch)
    if per_patch is not None:
        prepared["patch_label"] = per_patch
    return {"image": images, "label": labels, **prepared}
