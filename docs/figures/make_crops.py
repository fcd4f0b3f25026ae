"""The images behind docs/figures: scikit-learn's two photographs, and a small data set made from them.

The data set asks for what has to be found: a dahlia, a pagoda, or neither, anywhere on leaves, sky, lake and trees.
Both things are cut out by hand-drawn outlines and laid on pieces of both photographs that show neither, so that the
background gives nothing away. All images are made of the same two photographs: what is trained on them shows how
the figures are drawn, and knows nothing else.

    python docs/figures/make_crops.py build/photo

writes `build/photo/images/{train,val}/CLASS/*.jpg`, and the photographs as `build/photo/china.jpg` and `flower.jpg`.
"""

import argparse
import pathlib
import shutil

import numpy as np
import sklearn.datasets
from PIL import Image, ImageDraw

SIDE = 144
COUNTS = {"train": 400, "val": 50}
CLASSES = ("dahlia", "neither", "pagoda")
Outline = list[tuple[int, int]]

# In pixels of the photographs: the dahlia is round.
DAHLIA = (170, 84, 447, 362)
PAGODA: Outline = [
    *[(205, 29), (188, 62), (150, 90), (96, 108), (98, 134), (120, 140), (119, 158), (84, 168), (86, 186), (97, 192)],
    *[(95, 248), (63, 262), (66, 280), (81, 286), (76, 332), (90, 346), (160, 352), (205, 370), (216, 388), (300, 388)],
    *[(328, 372), (372, 340), (345, 318), (342, 272), (352, 255), (322, 238), (319, 185), (330, 174), (297, 160)],
    *[(295, 138), (320, 124), (270, 96), (222, 62), (215, 32)],
]
# Left, top, right, bottom of what shows neither.
GROUNDS = {
    "flower.jpg": [(0, 0, 165, 427), (450, 0, 640, 365), (0, 0, 640, 82)],
    "china.jpg": [(380, 0, 640, 427), (0, 290, 60, 427), (380, 120, 640, 427)],
}


def main() -> None:
    """Writes everything; the same every time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=pathlib.Path, help="folder to write")
    dest: pathlib.Path = parser.parse_args().dest
    source = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    photographs = {name: Image.open(source / name).convert("RGB") for name in GROUNDS}
    things = {"dahlia": cut_dahlia(photographs["flower.jpg"]), "pagoda": cut_pagoda(photographs["china.jpg"])}
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name in CLASSES:
            folder = dest / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                image = lay(things.get(name), ground(photographs, rng), rng)
                image.save(folder / f"{index:04d}.jpg", quality=92)
    for name in GROUNDS:
        shutil.copyfile(source / name, dest / name)


def cut_dahlia(photograph: Image.Image) -> Image.Image:
    """The bloom, RGBA, transparent around it."""
    mask = Image.new("L", photograph.size)
    ImageDraw.Draw(mask).ellipse(DAHLIA, fill=255)
    return cut(photograph, mask)


def cut_pagoda(photograph: Image.Image) -> Image.Image:
    """The pagoda, RGBA, transparent around it."""
    mask = Image.new("L", photograph.size)
    ImageDraw.Draw(mask).polygon(PAGODA, fill=255)
    return cut(photograph, mask)


def cut(photograph: Image.Image, mask: Image.Image) -> Image.Image:
    """What a mask leaves of a photograph."""
    thing = photograph.convert("RGBA")
    thing.putalpha(mask)
    return thing.crop(mask.getbbox())


def ground(photographs: dict[str, Image.Image], rng: np.random.Generator) -> Image.Image:
    """A square of leaves, sky, lake or trees; sometimes one half of each photograph's."""
    first, second = (piece(photographs, rng) for _ in range(2))
    if rng.random() < 0.5:
        seam = int(rng.integers(SIDE // 4, 3 * SIDE // 4))
        first.paste(second.crop((seam, 0, SIDE, SIDE)), (seam, 0))
    return first.rotate(90 * int(rng.integers(2)))


def piece(photographs: dict[str, Image.Image], rng: np.random.Generator) -> Image.Image:
    """A square cut out of one of the grounds."""
    name = sorted(GROUNDS)[int(rng.integers(2))]
    left, top, right, bottom = GROUNDS[name][int(rng.integers(len(GROUNDS[name])))]
    side = int(min(right - left, bottom - top) * rng.uniform(0.5, 1.0))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    return photographs[name].crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def lay(thing: Image.Image | None, under: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lays a thing somewhere on a ground, three to nine tenths as high as it, at least half of it inside."""
    if thing is None:
        return under
    height = int(SIDE * rng.uniform(0.3, 0.9))
    width = height * thing.width // thing.height
    small = thing.resize((width, height), Image.Resampling.BICUBIC)
    x = int(rng.integers(-width // 4, SIDE - 3 * width // 4))
    y = int(rng.integers(-height // 4, SIDE - 3 * height // 4))
    under.paste(small, (x, y), small)
    return under


if __name__ == "__main__":
    main()
