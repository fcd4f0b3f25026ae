"""Real JPEGs for the tests: crops of photographs that scikit-learn and scikit-image bring along."""

import io
import pathlib

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "rocket")


def photographs() -> dict[str, np.ndarray]:
    """Name -> pixels, uint8 (height, width, 3)."""
    found = {name: getattr(skimage.data, name)() for name in PHOTOGRAPHS}
    samples = load_sample_images()
    return {**found, **{pathlib.Path(n).stem: x for n, x in zip(samples.filenames, samples.images, strict=True)}}


def jpeg(pixels: np.ndarray, quality: int = 85) -> bytes:
    """The pixels as a JPEG file."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def make_folder(
    root: pathlib.Path, per_class: int, split: str = "", seed: int = 0, size: tuple[int, int] = (96, 80)
) -> None:
    """Writes `per_class` images `root/[split/]CLASS/0001.jpg`: random crops of half a photograph, resized to `size`."""
    rng = np.random.default_rng(seed)
    for name, pixels in photographs().items():
        folder = root / split / name
        folder.mkdir(parents=True)
        image = Image.fromarray(pixels)
        for index in range(per_class):
            fraction = rng.uniform(0.3, 0.6)
            width, height = int(image.width * fraction), int(image.height * fraction)
            left, top = int(rng.integers(image.width - width)), int(rng.integers(image.height - height))
            crop = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
            (folder / f"{index:04d}.jpg").write_bytes(jpeg(np.asarray(crop)))


def center_crop(
    encoded: bytes, size: int, fraction: float = 0.875, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Torchvision's evaluation crop in Pillow's words: resizes all of the image, then crops; int64 pixels."""
    with Image.open(io.BytesIO(encoded)) as image:
        shorter, (width, height) = int(size / fraction), image.size
        scale = [max(shorter, int(shorter * length / min(width, height))) for length in (width, height)]
        resized = image.resize((scale[0], scale[1]), resample)
    left, top = (round((length - size) / 2) for length in scale)
    return np.asarray(resized.crop((left, top, left + size, top + size)), np.int64)
