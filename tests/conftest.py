"""Strict tests: eight virtual devices and no silent rank promotion; pyproject.toml adds shapes and warnings."""

import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import quick_compile

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), quick_compile.FLAGS, quick_compile.devices(8)])
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile the same steps again and again, in several processes: they share what is compiled, also from run to run.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(".pytest_cache/jax").absolute())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import browser
import jax
import pytest
from launch_machine import Machine

from sit_jax.data.config import DataConfig
from sit_jax.data.registry import open_source

jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell's background jobs ignore Ctrl-C, and so would all processes that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the digits prepared in it."""
    folder = str(tmp_path_factory.mktemp("data"))
    open_source(DataConfig(data_dir=folder), "train")
    return folder


@pytest.fixture(scope="session")
def digits_config(digits_dir: str) -> Any:
    """A student of the digits and its teacher, small enough to train in a test."""
    # Imported here: what is imported before the tests are collected escapes the checks of shapes.
    import tiny

    from sit_jax.config import CheckpointConfig, LogConfig, OptimConfig

    return tiny.small(
        data=DataConfig(data_dir=digits_dir),
        batch_size=128,
        eval_batch_size=96,
        optim=OptimConfig(lr=1e-3, ema_decay=0.9),
        log=LogConfig(every_steps=5),
        checkpoint=CheckpointConfig(keep=2),
    )


@pytest.fixture(scope="session")
def digits_run(digits_config: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A teacher, then its student, trained for a few steps; tests leave the folder as it is, but for a summary."""
    from sit_jax.training.loop import run

    folder = tmp_path_factory.mktemp("runs") / "digits"
    run(digits_config, folder)
    return folder


@pytest.fixture(scope="session")
def elastic_run(digits_config: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A student for several token schedules, `tiny.CHOICES`; tests leave the folder as it is, but for a summary."""
    import dataclasses

    import tiny

    from sit_jax.config import ModelConfig
    from sit_jax.training.loop import run

    arch = dataclasses.replace(tiny.SLIMMED, keep_ratio=None, kept_tokens_choices=tiny.CHOICES)
    folder = tmp_path_factory.mktemp("runs") / "elastic"
    run(dataclasses.replace(digits_config, model=ModelConfig(architecture=arch)), folder)
    return folder


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    """A machine with fakes of what the launch scripts call."""
    return Machine(tmp_path / "a machine")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, started once; `browser.visit(chromium, url)` opens pages in it."""
    with browser.start_chromium() as started:
        yield started
