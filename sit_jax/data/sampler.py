"""Which example stands at which place of the endless stream of training batches."""

import dataclasses

from grain.experimental import index_shuffle

# Of the permutation's cipher; Grain's own shuffles use as many.
_ROUNDS = 4
_MASK = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """A map from the position in the global stream of examples to the example's index in the source.

    Positions `batch * batch_size` to `(batch + 1) * batch_size - 1` make up a global batch. The map is a pure function,
    so neither the number of hosts and loader processes nor a restart changes it. Every pass over the source is a
    permutation of its own; with `repeats`, a batch holds several views of each image, and a pass takes as many
    times longer: no image is left out.

    Attributes:
        length: Examples in the source.
        batch_size: Examples in a global batch.
        repeats: Views of each image in a batch. Where they do not divide the batch, the last view of some is missing.
        seed: Decides the permutations.
    """

    length: int
    batch_size: int
    repeats: int
    seed: int

    @property
    def pictures_per_batch(self) -> int:
        """Different images in a batch."""
        return -(-self.batch_size // self.repeats)

    def __call__(self, position: int) -> int:
        """The index in the source of the example at a position."""
        batch, place = divmod(position, self.batch_size)
        # Views of an image stand far apart, so that they fall on different devices.
        number = batch * self.pictures_per_batch + place % self.pictures_per_batch
        lap, index = divmod(number, self.length)
        seed = (self.seed * 0x9E3779B1 + lap * 0x85EBCA77) & _MASK
        return int(index_shuffle(index, max_index=self.length - 1, seed=seed, rounds=_ROUNDS))
