"""Functions that map a stream position to an example.

Loader processes unpickle these functions, so this module must not import the models.
"""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass

import numpy as np
from grain.experimental import index_shuffle

from sit_jax.data.label_maps import LabelMaps
from sit_jax.data.sources import ExampleArrays, Source
from sit_jax.data.transforms import EvalTransform, TrainTransform
from sit_jax.errors import ImageDecodeError, UserError

# After this many consecutive unreadable images, loading stops.
_MOST_BROKEN_IN_A_ROW = 100
_MOST_LABELS = 32
# Rounds of the cipher of the permutation; Grain's shuffles use the same number.
_ROUNDS = 4


@dataclass(frozen=True)
class TrainOrder:
    """A map from positions in the global stream to example indices in the source.

    Positions `batch * batch_size` to `(batch + 1) * batch_size - 1` make up a global batch. The map is a pure function,
    so it does not depend on the number of hosts and loader processes or on restarts. Each pass over the source uses a
    different permutation. With `repeats`, a batch has several views of each image, and a pass takes that many times
    longer; no image is left out. If they do not divide the batch size, some images have one view fewer.
    """

    length: int
    batch_size: int
    repeats: int
    seed: int

    def __call__(self, position: int) -> int:
        """Returns the index in the source of the example at a position."""
        batch, place = divmod(position, self.batch_size)
        # Views of an image are far apart, so that they are on different devices.
        images = -(-self.batch_size // self.repeats)
        number = batch * images + place % images
        lap, index = divmod(number, self.length)
        seed = (self.seed * 0x9E3779B1 + lap * 0x85EBCA77) & 0xFFFFFFFF
        return int(index_shuffle(index, max_index=self.length - 1, seed=seed, rounds=_ROUNDS))


@dataclass(frozen=True)
class TrainExamples:
    """Maps a position in the global stream to a training example.

    With `skip_broken`, an image that cannot be read is replaced with the next one of the source.
    """

    source: Source
    order: TrainOrder
    transform: TrainTransform
    maps: LabelMaps | None
    skip_broken: bool

    def __call__(self, position: int, rng: np.random.Generator) -> ExampleArrays:
        """Returns the example; raises an ImageDecodeError if it cannot be read."""
        index = self.order(int(position))
        for skipped in range(_MOST_BROKEN_IN_A_ROW):
            place = (index + skipped) % len(self.source)
            try:
                example = self.transform(self.source[place], rng)
            except ImageDecodeError:
                if not self.skip_broken:
                    raise
                continue
            if self.maps is not None:
                classes, values = self.maps[place]
                example |= {"map_classes": classes, "map_values": values}
            return {**example, "skipped": np.array(skipped, np.int32)}
        raise UserError(f"{_MOST_BROKEN_IN_A_ROW} consecutive images cannot be read; list them with sit data check")


@dataclass(frozen=True)
class EvalExamples:
    """Maps a position to an evaluation example with its `mask`.

    `mask` is 0 for positions beyond the end of the source, with `skip_broken` for images that cannot be read, and where
    `labels` are used for images without one.
    """

    source: Source
    transform: EvalTransform
    skip_broken: bool
    labels: bool = True

    def __call__(self, position: int) -> ExampleArrays:
        """Returns the example; raises an ImageDecodeError if it cannot be read."""
        if position >= len(self.source):
            return self._nothing()
        try:
            stored = self.source[int(position)]
            if self.labels and stored.label < 0:
                return self._nothing()  # ReaL has images without a correct class; they are not counted.
            example = self.transform(stored)
        except ImageDecodeError:
            if not self.skip_broken:
                raise
            return self._nothing()
        if self.source.multi_label:
            labels = np.array(stored.labels, np.int32)
            example["label"] = np.pad(labels, (0, _MOST_LABELS - len(labels)), constant_values=-1)
        return {**example, "mask": np.array(1, np.float32)}

    def _nothing(self) -> ExampleArrays:
        shape = (*self.transform.size, self.transform.channels)
        label = np.zeros(_MOST_LABELS if self.source.multi_label else (), np.int32)
        return {"image": np.zeros(shape, np.uint8), "label": label, "mask": np.array(0, np.float32)}


def start_worker(index: int, count: int) -> None:
    """Initializes a loader process: the trainer handles Ctrl-C, and the process ends with the trainer."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Also if the parent is killed. The kernel's PR_SET_PDEATHSIG is that of the thread which started this process, and
    # Grain starts its processes in threads that end earlier.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
