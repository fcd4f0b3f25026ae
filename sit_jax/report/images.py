"""Images of the report, and token maps as lists of images per stage."""

import base64
import io
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from sit_jax.report.evaluation import EvalImage, EvalReport, Neighbour, SimilarImages
from sit_jax.visual.images import as_rgb, heat, regions
from sit_jax.visual.token_maps import TokenMaps

# Number of tokens per stage with their own map: those with the most attention.
_TOKENS_SHOWN = 4
_LARGE, _SMALL = 288, 144
_QUALITY = 82


class Shown(NamedTuple):
    """An image of the page, as a `data:` URI with its alternative text."""

    uri: str
    alt: str


class Stage(NamedTuple):
    """The tokens of one image in one stage: `regions` have the mean color of each token's patches."""

    title: str
    regions: Shown
    tokens: list[Shown]
    text: str


class Example(NamedTuple):
    """An image with its predictions, as it is shown, and its stages, the first of which is the patches, if any."""

    image: EvalImage
    shown: Shown
    stages: list[Stage]


class ShownNeighbour(NamedTuple):
    """A neighbour of an image, as it is shown."""

    neighbour: Neighbour
    shown: Shown


class ShownSimilar(NamedTuple):
    """An image and its neighbours by each model's features, as they are shown."""

    image: EvalImage
    shown: Shown
    neighbours: dict[str, list[ShownNeighbour]]


def show_similar(similar: SimilarImages) -> ShownSimilar:
    """Returns an image and its neighbours as images of the page."""
    neighbours = {
        model: [ShownNeighbour(x, show_image(x.image, _SMALL)) for x in found]
        for model, found in similar.neighbours.items()
    }
    return ShownSimilar(similar.image, show_image(similar.image, _SMALL), neighbours)


def stage_titles(maps: TokenMaps) -> list[str]:
    """Returns the titles of the stages, the first of which is the patches."""
    count, patches = len(maps.stages) + 1, math.prod(maps.grid)
    titles = [f"Stage 1 of {count}: {_count(patches, 'token')}, one per patch"]
    return titles + [
        f"Stage {index} of {count}: {_count(stage.kept, 'token')} after block {stage.after_block}"
        for index, stage in enumerate(maps.stages, start=2)
    ]


def show_examples(evaluation: EvalReport) -> list[Example]:
    """Returns the examples with their drawn token maps."""
    maps = evaluation.maps
    return [
        Example(image, show_image(image), _stages(maps, index, image) if maps else [])
        for index, image in enumerate(evaluation.examples)
    ]


def show_image(image: EvalImage, side: int = _LARGE) -> Shown:
    """Returns an image of the page without token maps."""
    return Shown(data_uri(image.pixels, side), f"Image {image.index} of the split: {image.label}")


def _stages(maps: TokenMaps, row: int, image: EvalImage) -> list[Stage]:
    titles, patches, what = stage_titles(maps), math.prod(maps.grid), f"Image {image.index} ({image.label})"
    first = regions(image.pixels, np.arange(patches), maps.grid)
    stages = [
        Stage(titles[0], Shown(data_uri(first, _LARGE), f"{what} as {patches} patches"), [], "Every patch is a token.")
    ]
    for index, (title, stage) in enumerate(zip(titles[1:], maps.stages, strict=True)):
        overlooked, effective = stage.overlooked[row], stage.effective_patches[row]
        drawn = regions(image.pixels, stage.hard[row], maps.grid, overlooked)
        tokens = [
            Shown(
                data_uri(heat(image.pixels, stage.cumulative[row, token], maps.grid), _SMALL),
                f"{what}, where token {token + 1} looks: {effective[token]:.1f} effective patches",
            )
            for token in maps.most_attended(index, row, _TOKENS_SHOWN)
        ]
        text = f"A token is made of {effective.mean():.1f} patches on average ({effective.min():.1f} to "
        text += f"{effective.max():.1f}); {_count(int(overlooked.sum()), 'patch')} in no token."
        alt = f"{what} as {_count(stage.kept, 'region')}, one for each token"
        stages.append(Stage(title, Shown(data_uri(drawn, _LARGE), alt), tokens, text))
    return stages


def data_uri(pixels: UInt8[ndarray, "height width channels"], side: int) -> str:
    """Returns an image as a `data:` URI, at most `side` pixels wide and high."""
    image = Image.fromarray(as_rgb(pixels))
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def _count(number: int, noun: str) -> str:
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{ending}"
