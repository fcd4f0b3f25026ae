"""What a loader does with a position in the stream of examples.

Loader processes unpickle these, so nothing here imports the models.
"""

import dataclasses
from typing import Any

import numpy as np

from sit_jax.data.label_maps import LabelMaps
from sit_jax.data.sampler import TrainOrder
from sit_jax.data.sources import Source
from sit_jax.data.transforms import EvalTransform, TrainTransform
from sit_jax.errors import ImageDecodeError, UserError

# So many broken images in a row are no accident.
_MOST_BROKEN_IN_A_ROW = 100
_MOST_LABELS = 32


@dataclasses.dataclass(frozen=True)
class TrainExamples:
    """Position in the global stream -> training example.

    Attributes:
        source: Where images come from.
        order: Which image stands where.
        transform: What becomes of it.
        maps: Dense labels, or None.
        skip_broken: Whether the next image of the source stands in for one that cannot be read.
    """

    source: Source
    order: TrainOrder
    transform: TrainTransform
    maps: LabelMaps | None
    skip_broken: bool

    def __call__(self, position: int, rng: np.random.Generator) -> dict[str, Any]:
        """The example; raises ImageDecodeError for one that cannot be read."""
        index = self.order(int(position))
        for skipped in range(_MOST_BROKEN_IN_A_ROW):
            place = (index + skipped) % len(self.source)
            try:
                example = self.transform(self.source[place], rng)
            except ImageDecodeError as error:
                if not self.skip_broken:
                    raise _with_advice(error) from None
                continue
            if self.maps is not None:
                classes, values = self.maps[place]
                example |= {"map_classes": classes, "map_values": values}
            return {**example, "skipped": np.int32(skipped)}
        raise UserError(f"{_MOST_BROKEN_IN_A_ROW} pictures in a row cannot be read; look at them: sit data check")


@dataclasses.dataclass(frozen=True)
class EvalExamples:
    """Position -> evaluation example with its `mask`.

    Attributes:
        source: Where images come from; positions beyond its end give examples with mask 0.
        transform: What becomes of them.
        skip_broken: Whether an image that cannot be read gets mask 0.
    """

    source: Source
    transform: EvalTransform
    skip_broken: bool

    def __call__(self, position: int) -> dict[str, Any]:
        """The example; raises ImageDecodeError for one that cannot be read."""
        if position >= len(self.source):
            return self._nothing()
        try:
            stored = self.source[int(position)]
            if stored.label < 0:
                return self._nothing()  # ReaL has images without a right class: they do not count.
            example = self.transform(stored)
        except ImageDecodeError as error:
            if not self.skip_broken:
                raise _with_advice(error) from None
            return self._nothing()
        if self.source.multi_label:
            example["label"] = np.full(_MOST_LABELS, -1, np.int32)
            example["label"][: len(stored.labels)] = stored.labels
        return {**example, "mask": np.float32(1)}

    def _nothing(self) -> dict[str, Any]:
        size, channels = self.transform.size, self.transform.channels
        label = np.zeros(_MOST_LABELS if self.source.multi_label else (), np.int32)
        return {"image": np.zeros((size, size, channels), np.uint8), "label": label, "mask": np.float32(0)}


def start_worker(index: int, count: int) -> None:
    """Runs first in a loader process: Ctrl-C is for the process that asked for the run."""
    import signal

    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _with_advice(error: ImageDecodeError) -> ImageDecodeError:
    return ImageDecodeError(
        f"{error}; mend or remove it, or set data.on_decode_error=skip (sit data check lists all such)"
    )
