"""Opens the data set of a configuration."""

import pathlib
import sys
from collections.abc import Iterable

from sit_jax.data.config import DataConfig
from sit_jax.data.folder import FolderSource, ImagesSource
from sit_jax.data.sources import Source
from sit_jax.data.synthetic import SyntheticSource
from sit_jax.data.tfds_source import TfdsSource, prepared, prepared_digits
from sit_jax.errors import ConfigError


def open_source(data: DataConfig, split: str) -> Source:
    """Opens a split of a configuration's data set; prepares the digits if necessary. Raises UserErrors."""
    if "://" in data.data_dir:
        problem = f"{data.data_dir} is not a folder; mount the bucket, as launch/README.md says"
        raise ConfigError("data.data_dir", problem)
    if data.name in ("folder", "images"):
        if not data.data_dir:
            raise ConfigError("data.data_dir", f"must be the folder of images if data.name={data.name}")
        kind, used = FolderSource if data.name == "folder" else ImagesSource, (data.train_split, data.eval_split)
        return kind(pathlib.Path(data.data_dir), split, data.val_fraction, used)
    if data.name.partition("/")[0] == "synthetic":
        return SyntheticSource(data.name, split)
    builder = prepared_digits(data.data_dir) if data.name == "digits" else prepared(data.name, data.data_dir)
    return TfdsSource(builder, split)


def open_sources(data: DataConfig, quiet: bool = False) -> dict[str, Source]:
    """Opens the training and the evaluation split; raises as `open_source`, and logs the notes unless `quiet`."""
    sources = {split: open_source(data, split) for split in dict.fromkeys((data.train_split, data.eval_split))}
    if not quiet:
        log_notes(sources.values())
    return sources


def log_notes(sources: Iterable[Source]) -> None:
    """Prints the `notes` of folders of images, each once, on standard error."""
    for note in dict.fromkeys(note for source in sources for note in getattr(source, "notes", ())):
        print(note, file=sys.stderr)
