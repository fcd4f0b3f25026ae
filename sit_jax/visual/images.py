"""Token maps drawn over images, as RGB arrays, for figures, HTML pages and the demo."""

import functools

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

# Perceptually uniform, with monotonic lightness, and distinguishable with all types of colour blindness.
COLOURS = "inferno"
_LUMA = np.array([0.299, 0.587, 0.114])
# The image below a map is grey and low in contrast, so that only weights have colour.
_DARKEST, _LIGHTEST = 0.25, 0.95
_STRENGTH = 0.8
_LINE = np.array([255, 255, 255], np.uint8)
_LINES_PER_SIDE = 160
_OVERLOOKED = 0.35


def heat(
    image: UInt8[ndarray, "height width channels"],
    row: Float[ndarray, " patches"],
    grid: tuple[int, int],
    top: float | None = None,
) -> UInt8[ndarray, "height width 3"]:
    """Draws a heat map over a grey or RGB image: the image in grey, with each patch tinted by its weight in `row`.

    `grid` has the rows and columns of patches, `top` the weight of the brightest colour, the largest if None.
    """
    top = float(row.max()) if top is None else top
    level = np.clip(row / top, 0, 1) if top > 0 else np.zeros_like(row)
    tint = colour_table()[np.round(255 * level).astype(np.int64)][patch_index(image.shape, grid)]
    mixed = _mix(tint, as_rgb(image) @ _LUMA / 255)
    return np.clip(np.round(255 * mixed), 0, 255).astype(np.uint8)


def bar_colours() -> Float[ndarray, "256 3"]:
    """Returns the colours of `heat` from weight 0 to the largest, RGB from 0 to 1, for an image of medium grey."""
    return _mix(colour_table(), np.full(256, 0.5))


def _mix(tint: Float[ndarray, "*shape 3"], luma: Float[ndarray, "*shape"]) -> Float[ndarray, "*shape 3"]:
    ground = (_DARKEST + (_LIGHTEST - _DARKEST) * luma)[..., None]
    # Multiplication preserves the light and shade of the image within every colour.
    return (1 - _STRENGTH) * ground + _STRENGTH * tint * (0.6 + 0.4 * ground)


def regions(
    image: UInt8[ndarray, "height width channels"],
    hard_map: Int[ndarray, " patches"],
    grid: tuple[int, int],
    overlooked: Bool[ndarray, " patches"] | None = None,
) -> UInt8[ndarray, "height width 3"]:
    """Draws the patches of each token in `hard_map` as an outlined region in the mean colour of its pixels.

    Patches that are `overlooked` belong to no token: they are excluded from the means, and shown as a dim, grey image.
    """
    index = patch_index(image.shape, grid)
    owner = np.where(overlooked, -1, hard_map) if overlooked is not None else hard_map
    pixels, labels = as_rgb(image).astype(np.float64), owner[index] + 1
    flat = labels.ravel()
    counts = np.maximum(1, np.bincount(flat))
    means = np.stack([np.bincount(flat, pixels[:, :, c].ravel()) / counts for c in range(3)], axis=1)
    drawn = means[labels]
    in_no_token = labels == 0
    drawn[in_no_token] = (_OVERLOOKED * (pixels @ _LUMA))[in_no_token][:, None]
    result = np.round(drawn).astype(np.uint8)
    result[_borders(labels)] = _LINE
    return result


def as_rgb(image: UInt8[ndarray, "height width channels"]) -> UInt8[ndarray, "height width 3"]:
    """Converts grey or RGB pixels to RGB."""
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def patch_index(shape: tuple[int, ...], grid: tuple[int, int]) -> Int[ndarray, "height width"]:
    """Returns the index of the patch of each pixel of a (height, width, ...) image."""
    rows, columns = (np.arange(length) * count // length for length, count in zip(shape, grid, strict=False))
    return rows[:, None] * grid[1] + columns[None, :]


@functools.cache
def colour_table() -> Float[ndarray, "256 3"]:
    """Returns the colours of the map from weight 0 to the largest, RGB from 0 to 1."""
    import matplotlib  # The import is slow.

    return np.asarray(matplotlib.colormaps[COLOURS](np.arange(256))[:, :3])


def _borders(labels: Int[ndarray, "height width"]) -> Bool[ndarray, "height width"]:
    """Returns the pixels on the border between two regions."""
    width = max(1, round(min(labels.shape) / _LINES_PER_SIDE))
    line = np.zeros(labels.shape, bool)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    # Half of the border on either side; `width` pixels in all.
    for shift in range(-(width // 2), width - width // 2):
        rows, columns = np.nonzero(down)
        line[np.clip(rows + 1 + shift, 0, labels.shape[0] - 1), columns] = True
        rows, columns = np.nonzero(right)
        line[rows, np.clip(columns + 1 + shift, 0, labels.shape[1] - 1)] = True
    return line
