"""Draws training images as the model receives them: augmented, erased and mixed."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.data.config import InputSpec
from sit_jax.data.pipeline import Hosts, TrainData
from sit_jax.data.preprocess import prepare_batch
from sit_jax.data.registry import log_notes
from sit_jax.data.sources import writing
from sit_jax.errors import valid_text

_COLUMNS = 8


def draw_examples(spec: InputSpec, path: pathlib.Path, count: int, step: int = 0) -> int:
    """Writes a PNG file with a grid of the first images of a training batch and their labels; returns their number."""
    from matplotlib.figure import Figure

    data = TrainData(spec, Hosts())
    log_notes([data.source])
    batch = jax.jit(lambda x: prepare_batch(spec, x, jnp.asarray(step)))(next(data.batches(step)))
    images, labels = np.asarray(batch["image"])[:count], np.asarray(batch["label"])[:count]
    mean, std = np.array(spec.data.mean), np.array(spec.data.std)
    if images.shape[-1] == 1:
        mean, std = mean.mean(), std.mean()
    images = np.clip(images * std + mean, 0, 1)
    rows = -(-len(images) // _COLUMNS)
    figure = Figure(figsize=(1.7 * _COLUMNS, 2.0 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, label in zip(axes.flat, images, labels, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(valid_text(_title(label, data.source.class_names)), fontsize=7, parse_math=False)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, format="png")
    return len(images)


def _title(label: np.ndarray, names: Sequence[str]) -> str:
    """Returns the class name, or the two names and fractions of a mixed label; empty without a label."""
    if not label.any():
        return ""
    order = np.argsort(-label)[:2]
    weights = label[order] - label.min()  # Without label smoothing.
    if weights[1] <= 1e-3:
        return names[order[0]][:16]
    fractions = weights / weights.sum()
    return "\n".join(f"{names[i][:16]} {fraction:.0%}" for i, fraction in zip(order, fractions, strict=True))
