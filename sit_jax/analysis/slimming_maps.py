"""Where kept tokens look: assignment matrices as maps over the picture."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

# Columns of a figure beyond this would be too small to see.
_MAX_TOKENS_SHOWN = 8


def cumulative_assignment(
    assignments: Sequence[Float[ndarray, "batch tokens kept"]],
) -> Float[ndarray, "batch patches kept"]:
    """How much each patch of the picture contributes to each token after the last slimming module.

    The product of the modules' assignments; its columns sum to one, as each module's do.

    Args:
        assignments: The modules' assignments in order, each (batch, tokens, kept).
    """
    total = np.asarray(assignments[0], np.float64)
    for assignment in assignments[1:]:
        total = np.einsum("bnk,bkm->bnm", total, np.asarray(assignment, np.float64))
    return total.astype(np.float32)


def draw_slimming(
    path: pathlib.Path,
    images: Float[ndarray, "batch height width channels"],
    assignments: Sequence[Float[ndarray, "batch tokens kept"]],
    titles: Sequence[str],
) -> None:
    """Draws pictures and, beside each, where every token after the last slimming module looks.

    Args:
        path: PNG file to write.
        images: Pictures with values from 0 to 1.
        assignments: The modules' assignments on these pictures, in order.
        titles: One per picture.
    """
    from matplotlib.figure import Figure  # Takes a while to import; no display and no global state.

    weights = cumulative_assignment(assignments)
    tokens = min(weights.shape[2], _MAX_TOKENS_SHOWN)
    side = round(weights.shape[1] ** 0.5)
    rows = len(images)
    figure = Figure(figsize=(1.5 * (tokens + 1), 1.7 * rows), layout="constrained")
    axes = figure.subplots(rows, tokens + 1, squeeze=False)
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        picture = image.repeat(3, axis=-1) if image.shape[-1] == 1 else image
        axes[row, 0].imshow(picture)
        axes[row, 0].set_title(title, fontsize=8)
        for token in range(tokens):
            heat = weights[row, :, token].reshape(side, side)
            extent = (0, image.shape[1], image.shape[0], 0)
            axes[row, token + 1].imshow(picture, extent=extent)
            axes[row, token + 1].imshow(heat, extent=extent, cmap="inferno", alpha=0.65, interpolation="nearest")
            axes[row, token + 1].set_title(f"token {token + 1}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
