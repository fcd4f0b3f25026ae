"""Where pictures come from: every source is a sequence of (encoded bytes, label) with class names.

Sources travel to loader processes by pickle, and open their files there.
"""

import contextlib
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from sit_jax.data.config import DataConfig
from sit_jax.errors import ConfigError, PictureError, UserError, one_line

# ImageNet ReaL gives a picture several right classes; tfds calls them so.
_LABEL_KEYS = ("label", "real_label")
# ArrayRecord's messages: a record's checksum is wrong; the index at the end of the file cannot be read.
_DAMAGED_RECORD, _SHARD_INDEX = "Corrupted Riegeli/records file: chunk", "RiegeliPostscript"


class Example(NamedTuple):
    """One picture as it is stored.

    Attributes:
        image: Encoded bytes (PNG, JPEG).
        label: Class index; -1 where no class is right.
        name: File or record that it came from, for messages.
        labels: All right classes where a source has `multi_label`; else empty.
    """

    image: bytes
    label: int
    name: str = "picture"
    labels: tuple[int, ...] = ()


def read_picture(path: str, label: int = -1, name: str = "") -> Example:
    """Reads a picture's file.

    Args:
        path: The file.
        label: Its class index; -1 if unknown.
        name: What messages call it; the path if empty.

    Raises:
        PictureError: The file cannot be read, whatever the reason.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            os.set_blocking(file.fileno(), True)
            return Example(file.read(), label, name or path)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte in it.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PictureError(f"{name or path}: cannot be read: {reason}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Opens a pipe that nothing writes to, too, instead of waiting for a writer; such a pipe is empty."""
    return os.open(path, flags | os.O_NONBLOCK)


class Source(Protocol):
    """Random access to a split of a data set.

    Attributes:
        class_names: Names of the classes, by index.
        multi_label: Whether several classes, or none, may be right.
    """

    class_names: Sequence[str]
    multi_label: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The stored picture; raises a PictureError if only this one cannot be read, else a UserError."""
        ...


class TfdsSource:
    """A split of a tfds image classification data set, read as ArrayRecord without TensorFlow."""

    def __init__(self, builder: Any, split: str) -> None:
        """Opens a split of a prepared builder; `split` takes tfds's syntax, such as `train[:90%]`.

        Raises:
            UserError: There is no such split, or it holds no pictures with class labels.
        """
        import tensorflow_datasets as tfds

        features = builder.info.features
        keys = [key for key in _LABEL_KEYS if key in features]
        if not keys or "image" not in features:
            raise UserError(f"data.name: {builder.name} holds no pictures with class labels, but {', '.join(features)}")
        self._key = keys[0]
        self.multi_label = not isinstance(features[self._key], tfds.features.ClassLabel)
        names = features[self._key].feature.names if self.multi_label else features[self._key].names
        self.class_names: Sequence[str] = tuple(names)
        self._name = f"{builder.name} {split}"
        splits = ", ".join(builder.info.splits)
        try:
            decoders = {"image": tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except NotImplementedError:
            raise UserError(
                f"data.name: {builder.name} in {builder.data_path} is stored in a format without random access; "
                f"convert it: sit data prepare --from_tfrecord {builder.data_path} --data_dir DIR"
            ) from None
        except ValueError as error:
            raise UserError(f"split {split!r} of {builder.name} cannot be read: there are {splits} ({error})") from None
        if len(self._records) == 0:
            raise UserError(f"split {split!r} of {builder.name} is empty: there are {splits}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = f"{self._name}, example {index}"
        try:
            record = self._records[int(index)]
        except Exception as error:  # The reader of a damaged or missing shard raises what it likes.
            reason = one_line(error)
            # If the shard's index is readable and this record's checksum is wrong, the shard's other records are fine.
            # A shard that cannot be opened is never skipped: an evaluation of the rest would look like one of all.
            if reason.startswith(_DAMAGED_RECORD) and _SHARD_INDEX not in reason:
                raise PictureError(f"{name}: cannot be read: its record is damaged: {reason}") from None
            raise UserError(f"{name} cannot be read from its shard: {reason}") from None
        if record["image"] is None or record[self._key] is None:
            raise UserError(f"{name} is not in its shard, which is damaged; prepare or copy the data set again")
        stored = record.get("file_name", name)
        name = stored.decode(errors="replace") if isinstance(stored, bytes) else str(stored)
        if not self.multi_label:
            return Example(record["image"], int(record[self._key]), name)
        labels = tuple(int(x) for x in np.asarray(record[self._key]).ravel())
        return Example(record["image"], labels[0] if labels else -1, name, labels)


def open_source(data: DataConfig, split: str) -> Source:
    """Opens a split of the data set of a configuration; the embedded digits are prepared where they are not yet.

    Args:
        data: Names the data set.
        split: tfds split, or the split of a folder.

    Raises:
        UserError: The data set is not there or not readable, the folder cannot be written, or there is no such split.
    """
    if "://" in data.data_dir:
        raise ConfigError(f"data.data_dir: {data.data_dir} is no folder; mount the bucket, as launch/README.md says")
    if data.name == "folder":
        from sit_jax.data.folder import FolderSource

        if not data.data_dir:
            raise ConfigError("data.data_dir: must name the folder of pictures where data.name is folder")
        return FolderSource(pathlib.Path(data.data_dir).expanduser(), split, data.held_out)
    if data.name.partition("/")[0] == "synthetic":
        from sit_jax.data.synthetic import SyntheticSource

        return SyntheticSource(data.name, split)
    if data.name == "digits":
        return TfdsSource(_prepared_digits(data.data_dir), split)
    return TfdsSource(_prepared(data.name, data.data_dir), split)


def _prepared(name: str, data_dir: str) -> Any:
    builder = find_builder(name, data_dir)
    with quiet_tfds():
        prepared = builder.is_prepared()
    if not prepared:
        raise UserError(
            f"data.name: {name} is not prepared in {builder.data_path}; run: sit data prepare --name {name}"
            + (f" --data_dir {data_dir}" if data_dir else "")
        )
    return builder


def find_builder(name: str, data_dir: str) -> Any:
    """The tfds builder of a data set that tfds knows, or of one that lies prepared in `data_dir`.

    Raises:
        UserError: Neither knows it.
    """
    import tensorflow_datasets as tfds

    try:
        with quiet_tfds():
            folder = pathlib.Path(data_dir).expanduser() if data_dir else None
            return tfds.builder(name, data_dir=folder, file_format="array_record", try_gcs=False)
    except (ValueError, tfds.core.DatasetNotFoundError):
        pass
    try:
        with quiet_tfds():
            # Prepared by somebody else's builder, or in another format than ArrayRecord.
            return tfds.builder(name, data_dir=folder, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        known = "digits, folder, synthetic, or a name from https://www.tensorflow.org/datasets/catalog"
        raise UserError(
            f"data.name: there is no data set {name!r} in {data_dir or 'the tfds folder'}; use {known}"
        ) from None
    except (ValueError, ImportError) as error:
        raise UserError(f"data.name: {name!r} cannot be opened: {one_line(error)}") from None


def _prepared_digits(data_dir: str) -> Any:
    from sit_jax.data.digits import SitDigits

    folder = pathlib.Path(data_dir).expanduser() if data_dir else None
    where = folder or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    with writing(where, "data.data_dir"), quiet_tfds():
        builder = SitDigits(data_dir=folder, file_format="array_record")
        # Prepared in a temporary folder and renamed when whole, so a run that was cut off leaves nothing usable.
        builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def writing(place: object, key: str = "") -> Iterator[None]:
    """Turns what a full disk or a folder without permission raises into a UserError that names the place.

    Args:
        place: What is written.
        key: The configuration's key or the option that names it, if any.
    """
    prefix = f"{key}: " if key else ""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Not the file system: a download that failed.
            reason = one_line(error)
            raise UserError(f"{prefix}{place} cannot be prepared: {type(error).__name__}: {reason}") from None
        raise UserError(f"{prefix}{place} cannot be written: {error.strerror or error}") from None
    except RuntimeError as error:
        # The ArrayRecord writer is C++ and says so in its own way.
        match = re.search(r"(?:write|open|close|flush)\(\) failed: ([^;]+)", str(error))
        if match is None:
            raise
        raise UserError(f"{prefix}{place} cannot be written: {match[1]}") from None


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """tfds greets every preparation with progress bars and notes on its own state."""
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
