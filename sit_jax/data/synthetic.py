"""Synthetic images, to test a machine, a launcher or the step time without a data set."""

import functools
import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sit_jax.data.sources import Example
from sit_jax.errors import UserError

# The number of classes of ImageNet.
_SIZES = {"train": 1_281_167, "val": 50_000, "test": 50_000, "validation": 50_000}
_CLASSES = 1000
_SIDE = 256
_DIFFERENT = 64
_SPLIT = re.compile(r"([a-z]+)(?:\[:(\d+)\])?")


class SyntheticSource:
    """A split of `synthetic` (1000 classes) or `synthetic/N`; a few JPEG images of coloured noise, repeated."""

    multi_label = False

    def __init__(self, name: str, split: str) -> None:
        """Opens a split: `train`, `val`, `validation` or `test`, or its first examples, as in `train[:6400]`."""
        classes = name.partition("/")[2] or str(_CLASSES)
        if not classes.isdecimal() or not 1 <= int(classes) <= 100_000:
            raise UserError(f"data.name: {name!r} is not of the form synthetic/CLASSES, such as synthetic/1000")
        match = _SPLIT.fullmatch(split)
        if match is None or match[1] not in _SIZES or match[2] == "0":
            raise UserError(f"split {split!r} of synthetic images: there are train, val and test, and train[:6400]")
        self.class_names: Sequence[str] = tuple(map(str, range(int(classes))))
        size = _SIZES[match[1]]
        self._size = min(size, int(match[2])) if match[2] else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._size:
            raise IndexError(index)
        return Example(_images()[index % _DIFFERENT], index % len(self.class_names), f"synthetic image {index}")


@functools.cache
def _images() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(_DIFFERENT):
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return tuple(encoded)
