"""Dense labels for token labelling: the top classes at each position of a grid, for every training image."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from sit_jax.data.sources import writing
from sit_jax.errors import ConfigError, UserError, one_line

_CLASSES, _VALUES, _ABOUT = "classes.npy", "values.npy", "about.json"


class LabelMaps:
    """A folder of dense labels, in the order of the training split, read through memory maps.

    `classes.npy` is uint16 (examples, grid, grid, top), `values.npy` is float16 of the same shape: the `top` classes at
    each position of the whole, unflipped image, and their probabilities. The remaining probability is spread over all
    classes when the labels are used.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Opens the folder; raises a ConfigError if it does not exist or is incomplete."""
        self._folder = folder
        try:
            self._about = json.loads((folder / _ABOUT).read_text())
            self._classes = np.load(folder / _CLASSES, mmap_mode="r")
            self._values = np.load(folder / _VALUES, mmap_mode="r")
        except (OSError, ValueError) as error:
            problem = f"{folder} contains no label maps ({one_line(error)}); run: sit data label"
            raise ConfigError("data.label_maps", problem) from None
        if self._classes.shape != self._values.shape or self._classes.ndim != 4:
            raise ConfigError("data.label_maps", f"{folder} is incomplete; make it again: sit data label")

    def __reduce__(self) -> tuple[type["LabelMaps"], tuple[pathlib.Path]]:
        return LabelMaps, (self._folder,)  # Each process opens its own memory map.

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the classes, int32, and probabilities, float32, of an image, each (grid, grid, top)."""
        return self._classes[index].astype(np.int32), self._values[index].astype(np.float32)

    def check(self, examples: int, num_classes: int) -> None:
        """Raises a ConfigError if the labels were made for another data set."""
        if len(self) != examples:
            raise ConfigError("data.label_maps", f"has {len(self)} maps, but data.train_split has {examples} examples")
        theirs = self._about.get("num_classes")
        if theirs != num_classes:
            raise ConfigError("data.label_maps", f"is for {theirs} classes, but the data set has {num_classes}")


@contextlib.contextmanager
def new_label_maps(
    folder: pathlib.Path, examples: int, grid: int, top: int, num_classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the classes and values of a new folder, to be filled; `LabelMaps` rejects it if the context is left early.

    Raises a UserError if the folder already has label maps or cannot be written.
    """
    if (folder / _ABOUT).exists():
        raise UserError(f"{folder} holds label maps already; choose another --output")
    shape = (examples, grid, grid, top)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        classes = np.lib.format.open_memmap(folder / _CLASSES, mode="w+", dtype=np.uint16, shape=shape)
        values = np.lib.format.open_memmap(folder / _VALUES, mode="w+", dtype=np.float16, shape=shape)
    yield classes, values
    classes.flush()
    values.flush()
    (folder / _ABOUT).write_text(json.dumps({"num_classes": num_classes, "grid": grid, "top": top}) + "\n")
