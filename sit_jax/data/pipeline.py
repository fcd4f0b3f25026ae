"""Grain pipelines: batches as a function of (seed, step), with no state that would have to be saved."""

import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from sit_jax.config import Config, DataConfig
from sit_jax.data import transforms
from sit_jax.data.sources import Example, Source, open_source
from sit_jax.errors import ConfigError

HostBatch = dict[str, np.ndarray]


class TrainData:
    """The training batches of a run.

    Attributes:
        source: The split that they are read from.
        steps_per_epoch: Full batches in an epoch. What is left over comes in the next one: no example is lost.
    """

    def __init__(self, config: Config) -> None:
        """Opens the training split.

        Raises:
            UserError: The data cannot be prepared or read.
            ConfigError: The batch is larger than the data set, or the model has another number of classes.
        """
        self.source = open_source(config.data.name, config.data.train_split, config.data.data_dir)
        check_classes(config, self.source)
        self.steps_per_epoch = len(self.source) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(f"batch_size: {config.batch_size} is more than the {len(self.source)} training examples")
        arch = config.model.architecture
        augment = functools.partial(train_example, data=config.data, size=arch.image_size, channels=arch.in_channels)
        # The order and the choices depend on the seed and the example's index in the endless stream, nothing else.
        self._batches = (
            grain.MapDataset.source(self.source)
            .seed(config.seed)
            .shuffle()
            .repeat()
            .random_map(augment)
            .batch(config.batch_size, drop_remainder=True)
        )

    def batches(self, start_step: int = 0) -> Iterator[HostBatch]:
        """The endless stream of batches, from a step on; reading threads run ahead of it."""
        iterator = iter(self._batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
        iterator.set_state({"next_index": start_step})
        return iterator


def eval_batches(config: Config, source: Source) -> Iterator[HostBatch]:
    """The whole evaluation split once, in order, with `mask` 0 on the examples that fill the last batch up."""
    arch, size = config.model.architecture, config.eval_batch_size
    prepare = functools.partial(eval_example, size=arch.image_size, channels=arch.in_channels)
    for batch in grain.MapDataset.source(source).map(prepare).batch(size, drop_remainder=False).to_iter_dataset():
        count = len(batch["label"])
        padded = {key: np.pad(x, [(0, size - count)] + [(0, 0)] * (x.ndim - 1)) for key, x in batch.items()}
        yield {**padded, "mask": (np.arange(size) < count).astype(np.float32)}


def train_example(example: Example, rng: np.random.Generator, data: DataConfig, size: int, channels: int) -> Any:
    """One training example, varied at random."""
    image = transforms.resize(transforms.decode(example.image, channels), size)
    image = transforms.random_affine(image, rng, data.max_rotation, data.max_shift, data.max_zoom)
    return {"image": transforms.normalize(image), "label": np.int32(example.label)}


def eval_example(example: Example, size: int, channels: int) -> Any:
    """One evaluation example."""
    image = transforms.resize(transforms.decode(example.image, channels), size)
    return {"image": transforms.normalize(image), "label": np.int32(example.label)}


def check_classes(config: Config, source: Source) -> None:
    """Raises a ConfigError where the model's head does not fit the data set."""
    mine, theirs = config.model.architecture.num_classes, len(source.class_names)
    if mine != theirs:
        raise ConfigError(f"model.num_classes: is {mine}, but the data set has {theirs} classes")
