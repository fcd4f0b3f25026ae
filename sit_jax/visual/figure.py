"""Figures of token maps: print-quality ones of one image, and `slimming.png` of a run."""

import math
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy import ndarray

from sit_jax.errors import valid_text
from sit_jax.visual.images import as_rgb, bar_colours, heat, regions
from sit_jax.visual.token_maps import TokenMaps

# Sizes in inches and points.
_WIDTH, _MARGIN, _GAP = 10.4, 0.25, 0.09
_BAR, _BAR_ROOM = 0.09, 0.62
_HEADER, _HEADING, _CAPTION, _BETWEEN = 0.62, 0.26, 0.2, 0.16
_LARGEST_CELL, _LARGEST_VIEW = 1.25, 2.25
# Below narrower heat maps, only a number fits.
_CAPTIONED = 0.95
_PLOT, _LOWEST_PLOT = (1.9, 0.5), 1.2
_TITLE_SIZE, _HEADING_SIZE, _CAPTION_SIZE = 12, 9, 6.5
_LONGEST = 110
# Columns of `slimming.png`; more would be too small to see.
_MOST_COLUMNS = 8
_INK, _FAINT = "#1a1a1a", "#5c5c5c"


def draw_maps(
    path: pathlib.Path,
    image: UInt8[ndarray, "height width channels"],
    maps: TokenMaps,
    index: int,
    title: str,
    prediction: str,
    tokens: int,
    dpi: int,
) -> None:
    """Draws the token maps of one image, given in display size, of a batch.

    The figure has the image and its regions after each slimming module; for each module, heat maps of the tokens with
    the most attention; the attention by block; and the effective number of patches of the tokens.
    For a model without slimming modules, it has the image and the attention. `tokens` is the largest number of tokens
    per slimming module, and of blocks.
    """
    most = max([len(maps.attention), *(stage.kept for stage in maps.stages)])
    sheet = _Sheet(image, maps, index, min(tokens, most))
    top = sheet.height - _MARGIN
    sheet.write(_MARGIN, top, _short(title), _TITLE_SIZE, weight="bold", va="top", color=_INK)
    sheet.write(_MARGIN, top - 0.27, _short(prediction), _HEADING_SIZE, va="top")
    top = _draw_views(sheet, top - _HEADER)
    for stage in range(len(maps.stages)):
        top = _draw_tokens(sheet, top, stage)
    _draw_attention(sheet, top)
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes, without an error.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        sheet.figure.savefig(path, dpi=dpi, format="png", metadata={"Software": None})


class _Sheet:
    """The figure, with coordinates in inches from the lower left corner.

    `tokens` is the largest number of heat maps in a row, `cell` the longer side of one, `view` that of the image,
    `views` the height of the row with the image.
    """

    def __init__(self, image: ndarray, maps: TokenMaps, index: int, tokens: int) -> None:
        self.image, self.maps, self.index, self.tokens = image, maps, index, tokens
        stages = len(maps.stages)
        width, plot = _WIDTH - 2 * _MARGIN, sum(_PLOT) if stages else 0.0
        self.cell = min(_LARGEST_CELL, (width - _BAR_ROOM - (tokens - 1) * _GAP) / tokens)
        self.view = min(_LARGEST_VIEW, (width - plot - stages * _GAP) / (stages + 1))
        rows = (stages + 1) * (_HEADING + self.size(self.cell)[1] + _CAPTION + _BETWEEN)
        self.views = max(self.size(self.view)[1], _LOWEST_PLOT if stages else 0.0)
        self.height = 2 * _MARGIN + _HEADER + self.views + _CAPTION + rows
        self.figure = Figure(figsize=(_WIDTH, self.height), facecolor="white")

    def size(self, side: float) -> tuple[float, float]:
        """Returns width and height of an image with this longer side."""
        rows, columns = self.maps.grid
        return side * columns / max(rows, columns), side * rows / max(rows, columns)

    def caption(self, name: str, number: int, what: str) -> str:
        return f"{name} {number}: {what}" if self.cell >= _CAPTIONED else f"{number}"

    def write(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        # Names of files and classes may contain dollar signs, which are not formulas here.
        style = {"size": size, "color": _FAINT, "parse_math": False, **style}
        self.figure.text(x / _WIDTH, y / self.height, valid_text(text), **style)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Returns axes at a lower left corner."""
        return self.figure.add_axes((x / _WIDTH, y / self.height, width / _WIDTH, height / self.height))

    def show(self, x: float, top: float, side: float, pixels: ndarray, caption: str) -> None:
        """Draws an image, whose longer side is `side`, with its caption below."""
        width, height = self.size(side)
        axes = self.axes(x + (side - width) / 2, top - height, width, height)
        axes.imshow(pixels, aspect="auto", interpolation="antialiased")
        axes.set_axis_off()
        self.write(x + side / 2, top - height - 0.05, caption, _CAPTION_SIZE, ha="center", va="top", color=_INK)

    def bar(self, top: float, largest: float, label: str) -> None:
        """Draws the colour bar of a row of heat maps, on its right."""
        height = self.size(self.cell)[1]
        axes = self.axes(_WIDTH - _MARGIN - _BAR_ROOM + 0.08, top - height, _BAR, height)
        scale = ScalarMappable(Normalize(0, largest), ListedColormap(bar_colours()))
        bar = self.figure.colorbar(scale, cax=axes)
        bar.outline.set_linewidth(0.4)
        bar.ax.tick_params(labelsize=_CAPTION_SIZE, width=0.4, length=2, colors=_INK)
        if height >= _CAPTIONED:
            bar.set_label(label, size=_CAPTION_SIZE, color=_FAINT)
        else:  # Next to the bar it would overlap the bar of the next row.
            self.write(_WIDTH - _MARGIN, top + _HEADING, label, _CAPTION_SIZE, ha="right", va="top")


def _draw_views(sheet: _Sheet, top: float) -> float:
    """Draws the image, the regions after each slimming module, and the effective number of patches."""
    x, side, maps = _MARGIN, sheet.view, sheet.maps
    sheet.show(x, top, side, as_rgb(sheet.image), f"the image, {maps.grid[0]} x {maps.grid[1]} patches")
    for number, stage in enumerate(maps.stages, start=1):
        x += side + _GAP
        drawn = regions(sheet.image, stage.hard[sheet.index], maps.grid, stage.overlooked[sheet.index])
        sheet.show(x, top, side, drawn, f"regions of the {stage.kept} tokens of TSM {number}")
    if maps.stages:
        left = _WIDTH - _MARGIN - _PLOT[0]
        _plot_effective(sheet.axes(left, top - sheet.views + 0.05, _PLOT[0], sheet.views - 0.25), maps, sheet.index)
        sheet.write(left, top, "patches that tokens are made of; median", _CAPTION_SIZE, va="top", color=_INK)
    return top - sheet.views - _CAPTION - _BETWEEN


def _plot_effective(axes: Axes, maps: TokenMaps, index: int) -> None:
    names = []
    for place, stage in enumerate(maps.stages):
        counts = np.sort(stage.effective_patches[index])
        spread = np.linspace(-0.28, 0.28, len(counts)) if len(counts) > 1 else np.zeros(1)
        axes.plot(place + spread, counts, ".", ms=3.5, color="#3b5b92", mec="none")
        median = float(np.median(counts))
        axes.plot([place - 0.38, place + 0.38], [median, median], color=_INK, lw=0.9)
        names.append(f"TSM {place + 1}\n{_number(median)}")
    everything = math.prod(maps.grid)
    axes.axhline(everything, color=_FAINT, lw=0.6, ls=":")
    axes.set(ylim=(0, 1.06 * everything), xlim=(-0.55, len(maps.stages) - 0.45))
    axes.set_xticks(range(len(maps.stages)), names)
    axes.tick_params(labelsize=_CAPTION_SIZE, width=0.4, length=2, colors=_INK)
    for name, spine in axes.spines.items():
        spine.set(visible=name in ("left", "bottom"), linewidth=0.4)


def _draw_tokens(sheet: _Sheet, top: float, number: int) -> float:
    stage, index = sheet.maps.stages[number], sheet.index
    chosen = sheet.maps.most_attended(number, index, sheet.tokens)
    some = f"the {len(chosen)} with the most attention"
    text = f"TSM {number + 1}, after block {stage.after_block}: {stage.assignment.shape[1]} to {stage.kept} tokens"
    text += f" ({some if len(chosen) < stage.kept else 'all, by attention'})"
    effective = stage.effective_patches[index]
    captions = [sheet.caption("token", token + 1, f"{_number(effective[token])} patches") for token in chosen]
    rows = stage.cumulative[index][list(chosen)]
    scale = float(rows.max()) * rows.shape[1], "times the uniform weight"
    return _draw_row(sheet, top, text, rows, captions, scale)


def _draw_attention(sheet: _Sheet, top: float) -> float:
    maps, depth = sheet.maps, len(sheet.maps.attention)
    blocks = np.unique(np.round(np.linspace(1, depth, min(depth, sheet.tokens))).astype(int))
    rows = np.stack([maps.attention_on_patches(int(block))[sheet.index] for block in blocks])
    captions = [sheet.caption("block", int(b), f"{maps.attention[b - 1].shape[1]} tokens") for b in blocks]
    heading = f"Attention of {maps.attending}, distributed to the patches of the tokens (mean over heads)"
    # Early blocks can be much sharper than those after the slimming, whose maps would be black on a common scale.
    peaks = rows / np.maximum(rows.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return _draw_row(sheet, top, heading, peaks, captions, (1.0, "of each map's largest"))


def _draw_row(
    sheet: _Sheet, top: float, heading: str, rows: ndarray, captions: Sequence[str], scale: tuple[float, str]
) -> float:
    """Draws heat maps next to each other on one scale; the colour bar shows the largest weight and its unit."""
    sheet.write(_MARGIN, top, heading, _HEADING_SIZE, va="top", color=_INK)
    top -= _HEADING
    largest = float(rows.max())
    for place, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        x = _MARGIN + place * (sheet.cell + _GAP)
        sheet.show(x, top, sheet.cell, heat(sheet.image, row, sheet.maps.grid, largest), caption)
    sheet.bar(top, *scale)
    return top - sheet.size(sheet.cell)[1] - _CAPTION - _BETWEEN


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def draw_slimming(
    path: pathlib.Path, images: UInt8[ndarray, "batch height width channels"], maps: TokenMaps, titles: Sequence[str]
) -> None:
    """Draws images and, next to each, the token maps of all tokens after the last slimming module."""
    weights = maps.stages[-1].cumulative
    tokens, rows = min(weights.shape[1], _MOST_COLUMNS), len(images)
    figure = Figure(figsize=(1.5 * (tokens + 1), 1.7 * rows), layout="constrained")
    axes = figure.subplots(rows, tokens + 1, squeeze=False)
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes[row, 0].imshow(as_rgb(image))
        axes[row, 0].set_title(valid_text(title), fontsize=8, parse_math=False)
        for token in range(tokens):
            axes[row, token + 1].imshow(heat(image, weights[row, token], maps.grid))
            axes[row, token + 1].set_title(f"token {token + 1}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
