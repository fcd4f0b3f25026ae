"""Prepares training batches for the loss, on the device; pure functions."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sit_jax.data.config import InputSpec
from sit_jax.data.mixing import draw_mix, draw_token_mix, mix_images, mix_labels, soft_labels
from sit_jax.data.preprocess import normalize, random_erasing
from sit_jax.data.random_keys import stream_key
from sit_jax.data.token_labels import patch_labels


def prepare_batch(spec: InputSpec, batch: Mapping[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
    """Normalizes, erases and mixes images, and converts labels to distributions.

    `batch` has `image`, uint8 or already normalized float (batch, height, width, channels), and `label`, class indices
    (batch,) or distributions (batch, classes); with label maps also the arguments of `patch_labels`. The seed and
    `step`, the number of optimizer steps done, determine all random choices.

    Returns `image`, float32; `label` (batch, classes); with label maps `patch_label` (batch, patches, classes); with
    MixToken `token_mix` (batch, patches), True for patches that come from the partner image.
    """
    images, labels = batch["image"], batch["label"]
    if images.dtype == jnp.uint8:
        images = normalize(images, spec.data)
    if labels.ndim == 1:
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
        per_patch = patch_labels(*maps, spec.grid_size, spec.num_classes, spec.label_smoothing)
    if spec.mix.mix_token > 0:
        mix = draw_token_mix(key, images.shape[0], spec.grid_size, spec.mix)
        labels = mix_labels(labels, mix)
        prepared["token_mix"] = mix.inside.reshape(images.shape[0], -1)
        if per_patch is not None:
            per_patch = jnp.where(prepared["token_mix"][..., None], per_patch[::-1], per_patch)
    if per_patch is not None:
        prepared["patch_label"] = per_patch
    return {"image": images, "label": labels, **prepared}
