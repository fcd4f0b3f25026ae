"""Grain pipelines: batches are a function of (seed, step), so there is no state to save."""

import contextlib
import dataclasses
import errno
import pathlib
import re
import signal
from collections.abc import Generator

import grain
import jax
import numpy as np
from absl import flags

from sit_jax.data.config import DataConfig, InputSpec
from sit_jax.data.label_maps import LabelMaps
from sit_jax.data.map_fns import EvalExamples, TrainExamples, TrainOrder, start_worker
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source
from sit_jax.data.transforms import EvalTransform, TrainTransform
from sit_jax.errors import ConfigError, ImageDecodeError, RunError, UserError, require

HostBatch = dict[str, np.ndarray]
# A stream of batches; closing it stops the readers.
Stream = Generator[HostBatch, None, None]

# Number of positions in the endless stream; more than any run reaches.
_ENDLESS = 2**50


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Index of this process and number of processes: the part of every global batch that this process reads."""

    index: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> "Hosts":
        """Returns the part of this process under jax.distributed."""
        return cls(jax.process_index(), jax.process_count())

    def examples(self, name: str, batch_size: int) -> int:
        """Returns the examples of a global batch that each process reads; `name` is the key of the batch size."""
        if batch_size % self.count:
            raise ConfigError(name, f"{batch_size} examples do not divide over {self.count} processes")
        return batch_size // self.count


class TrainData:
    """Training batches of a run.

    `steps_per_epoch` counts full batches. The remaining examples are in the next epoch, so none is lost.
    """

    def __init__(self, spec: InputSpec, hosts: Hosts | None = None, source: Source | None = None) -> None:
        """Opens the training split, or a custom `source`, to read the part of `hosts` (by default of this process).

        Raises a UserError if the data cannot be read or do not match the batch size or the model's classes.
        """
        self.source = open_source(spec.data, spec.data.train_split) if source is None else source
        check_classes(spec, self.source)
        if self.source.multi_label and spec.labels:
            raise ConfigError("data.name", f"{spec.data.name} has several correct classes per image: evaluate only")
        self.steps_per_epoch = len(self.source) // spec.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError("batch_size", f"{spec.batch_size} is more than the {len(self.source)} training examples")
        self._data = spec.data
        self._hosts = hosts or Hosts.here()
        self._host_batch_size = self._hosts.examples("batch_size", spec.batch_size)
        maps = None
        if spec.data.label_maps:
            maps = LabelMaps(pathlib.Path(spec.data.label_maps))
            maps.check(len(self.source), spec.num_classes)
        order = TrainOrder(len(self.source), spec.batch_size, spec.augment.repeats, spec.seed)
        transform = TrainTransform(spec.data, spec.augment, spec.image_size, spec.channels)
        skip = spec.data.on_decode_error == "skip"
        # Order and random choices depend only on the seed and the position in the global stream.
        self._examples = (
            grain.MapDataset.range(_ENDLESS)
            .seed(spec.seed)
            .random_map(TrainExamples(self.source, order, transform, maps, skip))
        )

    def batches(self, start_step: int = 0) -> Stream:
        """Returns the endless stream of this process's part of the batches, starting at a step; readers prefetch.

        Each batch has uint8 `image` (host batch, height, width, channels), int32 `label` (host batch,), `crop` and
        `flipped` (see `TrainTransform`), int32 `skipped` (host batch,): the number of unreadable images that were
        replaced; with label maps also `map_classes` and `map_values`.

        Iterating raises a UserError if an image cannot be read, and a RunError if a loader process died.
        """
        first = start_step * self._hosts.count + self._hosts.index
        mine = self._examples.batch(self._host_batch_size, drop_remainder=True)[first :: self._hosts.count]
        return _read_ahead(mine, self._data)


def eval_batches(spec: InputSpec, source: Source, hosts: Hosts | None = None) -> Stream:
    """Returns this process's part of the whole evaluation split, once and in order; raises as `TrainData.batches` does.

    All processes yield the same number of batches. `mask` is 0 for padding examples, and for unreadable images if
    `data.on_decode_error` is `skip`. `label` is (host batch,), or (host batch, labels) padded with -1 for a source with
    several correct classes.
    """
    hosts = hosts or Hosts.here()
    host_batch_size = hosts.examples("eval_batch_size", spec.eval_batch_size)
    transform = EvalTransform(spec.data, spec.image_size, spec.channels)
    # Padded to whole global batches, so that all processes take the same number of steps.
    total = -(-len(source) // spec.eval_batch_size) * spec.eval_batch_size
    examples = EvalExamples(source, transform, spec.data.on_decode_error == "skip", spec.labels)
    batches = grain.MapDataset.range(total).map(examples).batch(host_batch_size, drop_remainder=True)
    return _read_ahead(batches[hosts.index :: hosts.count], spec.data)


def _read_ahead(batches: grain.MapDataset[HostBatch], data: DataConfig) -> Stream:
    """Iterates over batches with prefetching by `data.workers` processes or `data.threads` threads of this process."""
    # At most two finished batches per reader are queued, so memory stays bounded if the steps are slow.
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.threads))
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain passes its flags to its processes and requires parsed ones.
        processes = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=1)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=start_worker)
    iterator = iter(dataset)
    try:
        while True:
            try:
                yield next(iterator)
            except StopIteration:
                return
            except ImageDecodeError as error:
                advice = "fix or remove it, or set data.on_decode_error=skip (sit data check lists all such)"
                raise ImageDecodeError(f"{error}; {advice}") from None
            except UserError as error:
                error.__notes__ = []  # Without Grain's note and the traceback of the loader process.
                raise error.with_traceback(None) from None
            except (OSError, RuntimeError) as error:
                problem = _loader_problem(error) if data.workers else None
                if problem is None:
                    raise
                raise RunError(f"{problem}, or use fewer data.workers. Continue with --resume") from None
    finally:
        if hasattr(iterator, "close"):
            with contextlib.suppress(AssertionError):  # A process could not be started.
                iterator.close()


def _loader_problem(error: OSError | RuntimeError) -> str | None:
    """Returns why loader processes failed, and what to do; None for other errors."""
    died = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    # A process that writes to a full /dev/shm gets SIGBUS; semaphores do not fit, with ENOSPC.
    if getattr(error, "errno", None) == errno.ENOSPC or (died and int(died[1]) == -signal.SIGBUS):
        return "/dev/shm is full, where loader processes put batches; enlarge it (docker run --shm-size=8g)"
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return "loader processes need more open files; raise the limit (ulimit -n 65536)"
    return f"a loader process died (exit code {died[1]}), possibly out of memory; free memory" if died else None


def check_classes(spec: InputSpec, source: Source) -> None:
    """Raises a ConfigError if labels are used, and the data set has none or the model's head does not match them."""
    if not spec.labels:
        return
    check_has_classes(spec.data, source)
    mine, theirs = spec.num_classes, len(source.class_names)
    if mine != theirs:
        raise ConfigError("model.num_classes", f"must be {theirs}, as in the data set, got {mine}")


def check_has_classes(
    data: DataConfig, source: Source, advice: str = "set loss.classification=0 to train without labels"
) -> None:
    """Raises a ConfigError, which ends with advice, if the data set has no classes."""
    require(len(source.class_names) > 0, "data.name", f"{data.name} has no classes; {advice}")
