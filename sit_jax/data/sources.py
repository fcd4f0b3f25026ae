"""Where pictures come from: every source is a sequence of (image bytes, label) with class names."""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from sit_jax.errors import UserError


class Example(NamedTuple):
    """One picture as it is stored.

    Attributes:
        image: Encoded bytes (PNG, JPEG).
        label: Class index.
    """

    image: bytes
    label: int


class Source(Protocol):
    """Random access to a split of a data set."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class TfdsSource:
    """A split of a tfds image classification data set, read as ArrayRecord without TensorFlow.

    Attributes:
        class_names: Names of the classes, by index.
    """

    def __init__(self, builder: Any, split: str) -> None:
        """Opens a split of a prepared builder; `split` takes tfds's syntax, such as `train[:90%]`.

        Raises:
            UserError: There is no such split.
        """
        import tensorflow_datasets as tfds

        self.class_names: list[str] = list(builder.info.features["label"].names)
        try:
            decoders = {"image": tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except ValueError as error:
            splits = ", ".join(builder.info.splits)
            raise UserError(f"split {split!r} of {builder.name} cannot be read: there are {splits} ({error})") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        return Example(record["image"], int(record["label"]))


def open_source(name: str, split: str, data_dir: str = "") -> Source:
    """Opens a split of a data set by name, preparing it first where it is embedded and not there yet.

    Args:
        name: `digits`.
        split: tfds split.
        data_dir: Where prepared data sets lie; empty for tfds's default.

    Raises:
        UserError: The folder cannot be written, or there is no such split.
    """
    assert name == "digits", name  # The config admits nothing else.
    return TfdsSource(_prepared_digits(data_dir), split)


def _prepared_digits(data_dir: str) -> Any:
    from sit_jax.data.digits import SitDigits

    folder = pathlib.Path(data_dir).expanduser() if data_dir else None
    try:
        with _quiet_tfds():
            builder = SitDigits(data_dir=folder, file_format="array_record")
            # Prepared in a temporary folder and renamed when whole, so a run that was cut off leaves nothing usable.
            builder.download_and_prepare()
    except OSError as error:
        where = folder or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        raise UserError(f"data.data_dir: the digits cannot be prepared in {where}: {error}") from None
    return builder


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """tfds greets every preparation with progress bars and notes on its own state; this one takes a second."""
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
