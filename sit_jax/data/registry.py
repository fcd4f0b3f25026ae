"""Opens the data set of a configuration."""

import pathlib

from sit_jax.data.config import DataConfig
from sit_jax.data.folder import FolderSource
from sit_jax.data.sources import Source
from sit_jax.data.synthetic import SyntheticSource
from sit_jax.data.tfds_source import TfdsSource, prepared, prepared_digits
from sit_jax.errors import ConfigError


def open_source(data: DataConfig, split: str) -> Source:
    """Opens a split of a configuration's data set; prepares the digits if necessary. Raises UserErrors."""
    if "://" in data.data_dir:
        problem = f"{data.data_dir} is not a folder; mount the bucket, as launch/README.md says"
        raise ConfigError("data.data_dir", problem)
    if data.name == "folder":
        if not data.data_dir:
            raise ConfigError("data.data_dir", "must be the folder of images if data.name=folder")
        return FolderSource(pathlib.Path(data.data_dir), split, data.val_fraction)
    if data.name.partition("/")[0] == "synthetic":
        return SyntheticSource(data.name, split)
    builder = prepared_digits(data.data_dir) if data.name == "digits" else prepared(data.name, data.data_dir)
    return TfdsSource(builder, split)
