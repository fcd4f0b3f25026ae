"""Generates the dense labels of token labelling with a trained model."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from sit_jax.config import DataConfig
from sit_jax.data.label_maps import new_label_maps
from sit_jax.data.pipeline import Hosts, check_classes, eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import open_source
from sit_jax.errors import PartialFailureError, UserError
from sit_jax.io.load import load_run
from sit_jax.io.model import Model


def write_label_maps(run: pathlib.Path, output: pathlib.Path, top: int, data: DataConfig | None = None) -> int:
    """Writes dense labels of a training split, predicted by a run's model, to `LabelMaps`; returns their number.

    The model is either convolutional, with its head applied at each position of the last feature map, or a transformer
    with an auxiliary head. The `top` most likely classes are stored per position. `data` is that of the run if None.
    Raises a PartialFailureError if images could not be read; the folder is complete then, with uniform labels for them.
    """
    model = load_run(run)
    assert model.config is not None
    config = dataclasses.replace(model.config, data=data or model.data)
    source = open_source(config.data, config.data.train_split)
    check_classes(config.inputs, source)
    forward, grid = _dense_forward(model)
    arch = config.model.architecture
    # The whole image is labelled, independent of the training crop.
    whole = dataclasses.replace(config.data, resize="stretch", on_decode_error="skip")
    batches = eval_batches(dataclasses.replace(config.inputs, data=whole), source, Hosts())
    size = config.eval_batch_size
    top = min(top, arch.num_classes)
    labelled = 0
    maps = new_label_maps(output, len(source), grid, top, arch.num_classes)
    with maps as (all_classes, all_values), tqdm(total=len(source), unit="images") as progress:
        for number, batch in enumerate(batches):
            values, classes = jax.lax.top_k(forward(jnp.asarray(batch["image"])), top)
            count = min(size, len(source) - number * size)
            part, shape = slice(number * size, number * size + count), (count, grid, grid, top)
            readable = batch["mask"][:count] > 0
            all_classes[part] = np.asarray(classes)[:count].reshape(shape)
            all_values[part] = np.asarray(values)[:count].reshape(shape)
            all_values[part][~readable] = 0  # Probabilities of a black image are meaningless; zeros mean uniform.
            labelled += int(readable.sum())
            progress.update(count)
    if labelled < len(source):
        skipped = len(source) - labelled
        raise PartialFailureError(
            f"{skipped} of {len(source)} images could not be read and have no labels in {output}; the others have. "
            "sit data check lists them"
        )
    return labelled


def _dense_forward(model: Model) -> tuple[Callable[[Array], Array], int]:
    """Returns the jitted map from uint8 images to probabilities (batch, positions, classes), and the grid size."""
    arch, module = model.arch, model.module

    def forward(images: Array) -> Array:
        _, outputs = module.bind(model.variables)(normalize(images, model.data))
        if outputs.patch_logits is None:
            raise UserError("--workdir: its model has no dense head; use one with model.aux_head=True, or a RegNet")
        return jax.nn.softmax(outputs.patch_logits)

    shape = (1, *arch.image_shape, arch.in_channels)
    if len(set(arch.image_shape)) > 1:
        raise UserError("--workdir: its model has images that are not square; label maps are square")
    positions = jax.eval_shape(forward, jax.ShapeDtypeStruct(shape, jnp.uint8)).shape[1]
    return jax.jit(forward), round(positions**0.5)
