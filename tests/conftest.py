"""Strict tests: eight virtual devices and no silent rank promotion; pyproject.toml adds shapes and warnings."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile the same steps again and again, in several processes: they share what is compiled, also from run to run.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(".pytest_cache/jax").absolute())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import browser
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


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, started once; `browser.visit(chromium, url)` opens pages in it."""
    with browser.start_chromium() as started:
        yield started
