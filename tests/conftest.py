"""Strict tests: eight virtual devices and no silent rank promotion; pyproject.toml adds shapes and warnings."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from sit_jax.data.config import DataConfig
from sit_jax.data.sources import open_source

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the digits prepared in it."""
    folder = str(tmp_path_factory.mktemp("data"))
    open_source(DataConfig(data_dir=folder), "train")
    return folder
