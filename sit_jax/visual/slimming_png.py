"""`slimming.png` of a run: token maps of the kept tokens for a few images."""

import pathlib
from collections.abc import Sequence

from jaxtyping import UInt8
from numpy import ndarray

from sit_jax.visual.images import as_rgb, heat
from sit_jax.visual.token_maps import TokenMaps

# Maximum number of columns; more would be too small to see.
_MAX_TOKENS_SHOWN = 8


def draw_slimming(
    path: pathlib.Path,
    images: UInt8[ndarray, "batch height width channels"],
    maps: TokenMaps,
    titles: Sequence[str],
) -> None:
    """Draws images and, next to each, the token maps of all tokens after the last slimming module."""
    from matplotlib.figure import Figure  # The import is slow; Figure needs no display and no global state.

    weights = maps.stages[-1].cumulative
    tokens, rows = min(weights.shape[1], _MAX_TOKENS_SHOWN), len(images)
    figure = Figure(figsize=(1.5 * (tokens + 1), 1.7 * rows), layout="constrained")
    axes = figure.subplots(rows, tokens + 1, squeeze=False)
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes[row, 0].imshow(as_rgb(image))
        axes[row, 0].set_title(title, fontsize=8)
        for token in range(tokens):
            axes[row, token + 1].imshow(heat(image, weights[row, token], maps.grid))
            axes[row, token + 1].set_title(f"token {token + 1}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
