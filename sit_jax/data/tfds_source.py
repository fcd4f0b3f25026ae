"""Data sets of tfds, read as ArrayRecord without TensorFlow."""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sit_jax.data.sources import Example, writing
from sit_jax.errors import ConfigError, ImageDecodeError, UserError, one_line

# A `tfds.core.DatasetBuilder`; importing tfds takes seconds.
Builder = Any

# ImageNet ReaL has several correct classes per image; this is the feature's name in tfds.
_LABEL_KEYS = ("label", "real_label")
# Messages of ArrayRecord: the checksum of a record is wrong; the index at the end of the file cannot be read.
_DAMAGED_RECORD, _SHARD_INDEX = "Corrupted Riegeli/records file: chunk", "RiegeliPostscript"


class TfdsSource:
    """A split of a tfds image data set, read as ArrayRecord without TensorFlow; without labels, it has no classes."""

    def __init__(self, builder: Builder, split: str) -> None:
        """Opens a split of a prepared builder; raises a UserError if there is none or it has no images."""
        import tensorflow_datasets as tfds

        features = builder.info.features
        key = next((x for x in _LABEL_KEYS if x in features), "")
        if "image" not in features:
            raise ConfigError("data.name", f"{builder.name} contains no images, but {', '.join(features)}")
        self._key, label = key, features[key] if key else None
        self.multi_label = bool(key) and not isinstance(label, tfds.features.ClassLabel)
        names = () if label is None else label.feature.names if self.multi_label else label.names
        self.class_names: Sequence[str] = tuple(names)
        self._name = f"{builder.name} {split}"
        splits = ", ".join(builder.info.splits)
        try:
            self._records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:
            problem = (
                f"{builder.name} in {builder.data_path} is stored in a format without random access; "
                f"convert it: sit data prepare --from_tfrecord {builder.data_path} --data_dir DIR"
            )
            raise ConfigError("data.name", problem) from None
        except ValueError as error:
            raise UserError(f"split {split!r} of {builder.name} cannot be read: there are {splits} ({error})") from None
        if len(self._records) == 0:
            raise UserError(f"split {split!r} of {builder.name} is empty; available splits: {splits}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = f"{self._name}, example {index}"
        try:
            record = self._records[int(index)]
        except Exception as error:  # The reader of a damaged or missing shard raises many types of errors.
            reason = one_line(error)
            # If the shard's index is readable and only this record's checksum is wrong, the shard's other records are
            # valid. A shard that cannot be opened is never skipped: an evaluation of the rest would look like one of
            # all.
            if reason.startswith(_DAMAGED_RECORD) and _SHARD_INDEX not in reason:
                raise ImageDecodeError(f"{name}: cannot be read: its record is damaged: {reason}") from None
            raise UserError(f"{name} cannot be read from its shard: {reason}") from None
        label = record[self._key] if self._key else -1
        if record["image"] is None or label is None:
            raise UserError(f"{name} is not in its shard, which is damaged; prepare or copy the data set again")
        stored = record.get("file_name", name)
        name = stored.decode(errors="replace") if isinstance(stored, bytes) else str(stored)
        if not self.multi_label:
            return Example(record["image"], int(label), name)
        labels = tuple(int(x) for x in np.asarray(label).ravel())
        return Example(record["image"], labels[0] if labels else -1, name, labels)


def prepared(name: str, data_dir: str) -> Builder:
    """Returns the builder of a prepared data set; raises a ConfigError if it is not prepared."""
    builder = find_builder(name, data_dir)
    with quiet_tfds():
        if builder.is_prepared():
            return builder
    where = f"{name} --data_dir {data_dir}" if data_dir else name
    problem = f"{name} is not prepared in {builder.data_path}; run: sit data prepare --name {where}"
    raise ConfigError("data.name", problem)


def find_builder(name: str, data_dir: str) -> Builder:
    """Returns the tfds builder of a data set that tfds knows, or that is prepared in `data_dir`."""
    import tensorflow_datasets as tfds

    folder = tfds_folder(data_dir)
    try:
        with quiet_tfds():
            with contextlib.suppress(ValueError, tfds.core.DatasetNotFoundError):
                return tfds.builder(name, data_dir=folder, file_format="array_record", try_gcs=False)
            # Prepared by another builder, or in another format than ArrayRecord.
            return tfds.builder(name, data_dir=folder, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        where = data_dir or "the tfds folder"
        known = "digits, folder, synthetic, or a name from https://www.tensorflow.org/datasets/catalog"
        raise ConfigError("data.name", f"there is no data set {name!r} in {where}; use {known}") from None
    except (ValueError, ImportError) as error:
        raise ConfigError("data.name", f"{name!r} cannot be opened: {one_line(error)}") from None


def tfds_folder(data_dir: str) -> pathlib.Path | None:
    """Returns the folder of prepared data sets: the given one, or `TFDS_DATA_DIR`; None for the default of tfds."""
    # tfds does not expand `~` in this variable, and no shell does so in an environment file.
    folder = data_dir or os.path.expanduser(os.environ.get("TFDS_DATA_DIR", ""))
    return pathlib.Path(folder) if folder else None


def prepared_digits(data_dir: str) -> Builder:
    """Returns the builder of the digits; prepares them if necessary."""
    from sit_jax.data.digits import SitDigits  # This imports tfds, which takes seconds.

    folder = tfds_folder(data_dir)
    with writing(folder or "~/tensorflow_datasets", "data.data_dir"), quiet_tfds():
        builder = SitDigits(data_dir=folder, file_format="array_record")
        # Prepared in a temporary folder and renamed when complete, so an interrupted run leaves no partial data set.
        builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Suppresses the progress bars and notes that tfds prints for each preparation."""
    import tensorflow_datasets as tfds

    logger = logging.getLogger("absl")
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        tfds.enable_progress_bar()
