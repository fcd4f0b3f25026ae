"""Maps positions in the endless stream of training examples to example indices."""

import dataclasses

from grain.experimental import index_shuffle

# Rounds of the cipher of the permutation; Grain's shuffles use the same number.
_ROUNDS = 4
_MASK = 2**32 - 1


@dataclasses.dataclass(frozen=True)
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

    @property
    def images_per_batch(self) -> int:
        """Number of different images in a batch."""
        return -(-self.batch_size // self.repeats)

    def __call__(self, position: int) -> int:
        """Returns the index in the source of the example at a position."""
        batch, place = divmod(position, self.batch_size)
        # Views of an image are far apart, so that they are on different devices.
        number = batch * self.images_per_batch + place % self.images_per_batch
        lap, index = divmod(number, self.length)
        seed = (self.seed * 0x9E3779B1 + lap * 0x85EBCA77) & _MASK
        return int(index_shuffle(index, max_index=self.length - 1, seed=seed, rounds=_ROUNDS))
