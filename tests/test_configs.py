"""Every page in configs/: it builds, a step of it traces, and the paper's recipe has the paper's learning rates."""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.cli.config_file import load_config
from sit_jax.config import Config
from sit_jax.models.architecture import Architecture
from sit_jax.training.step import abstract_state, make_train_spec, train_step

PAGES = sorted(pathlib.Path("configs").glob("*.py"))
IMAGENET_TRAIN = 1_281_167


def abstract_batch(config: Config) -> dict[str, Any]:
    arch, size = config.model.architecture, config.batch_size
    shape = (size, arch.image_size, arch.image_size, arch.in_channels)
    batch: dict[str, Any] = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "skipped": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    if config.loss.token_label > 0:
        maps = (size, 14, 14, 5)
        batch |= {
            "map_classes": jax.ShapeDtypeStruct(maps, jnp.int32),
            "map_values": jax.ShapeDtypeStruct(maps, jnp.float32),
            "crop": jax.ShapeDtypeStruct((size, 4), jnp.float32),
            "flipped": jax.ShapeDtypeStruct((size,), jnp.bool_),
        }
    return batch


def trace_step(config: Config) -> dict[str, Any]:
    """Metrics of one traced train step; nothing is computed."""
    task = make_train_spec(config, steps_per_epoch=100)
    state = abstract_state(task)
    teachers = {}
    if task.teacher is not None and config.teacher is not None:
        arch = config.teacher.model.architecture
        images = jax.ShapeDtypeStruct((1, arch.image_size, arch.image_size, arch.in_channels), jnp.float32)
        teachers["teacher"] = jax.eval_shape(task.teacher.init, jax.random.key(0), images)
    _, metrics = jax.eval_shape(lambda *x: train_step(task, *x), state, abstract_batch(config), teachers)
    return dict(metrics)


def shallow(config: Config) -> Config:
    """The page with two blocks per stage at most: tracing two dozen takes long, and they are all alike."""
    arch = config.model.architecture
    assert isinstance(arch, Architecture)
    stages = tuple(min(2, x) for x in arch.stage_blocks)
    depth = sum(stages) or 2
    model = dataclasses.replace(arch, depth=depth, stage_blocks=stages)
    teacher = config.teacher
    if teacher is not None:
        full = teacher.model.architecture
        assert isinstance(full, Architecture)
        theirs = dataclasses.replace(teacher.model, architecture=dataclasses.replace(full, depth=depth))
        teacher = dataclasses.replace(teacher, model=theirs)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, architecture=model), teacher=teacher)


@pytest.mark.parametrize("page", [str(page) for page in PAGES] + ["configs/imagenet_lvvit_tiny.py:token_labelling"])
def test_page_builds_and_its_step_traces(page: str) -> None:
    config = shallow(load_config(page).with_classes(12))
    metrics = trace_step(config)
    expected = {"loss", "classification", "accuracy", "grad_norm", "lr/model"}
    if config.loss.token > 0:
        expected |= {"token", "logits", "lr/reverse"}
    if config.loss.token_label > 0:
        expected |= {"token_label"}
    assert set(metrics) == expected
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docstring_tells_accuracy_hardware_and_command(page: pathlib.Path) -> None:
    text = page.read_text().split('"""')[1]
    command = " ".join(text.replace("\\\\\n", " ").split())
    if page.stem == "digits":
        return
    assert f"sit train --config configs/{page.name}" in command
    assert re.search(r"Reported|Expect", text)
    assert re.search(r"GPU|cores", text)


@pytest.mark.parametrize("size", ["tiny", "xsmall", "small", "medium", "large"])
def test_learning_rates_of_the_papers_recipe(size: str) -> None:
    config = load_config(f"configs/imagenet_sit_{size}.py")
    epoch = IMAGENET_TRAIN // config.batch_size
    rates = make_train_spec(config, epoch).rates
    expected = {0: (4.0e-4, 2.0e-3), 62: (2.08e-4, 1.02e-3), 100: (4.7e-5, 2.0e-4), 125: (1e-5, 1e-5)}
    for number, (model, reverse) in expected.items():
        for step in (number * epoch, number * epoch + epoch - 1):  # Set per epoch.
            assert float(rates["model"](jnp.asarray(step))) == pytest.approx(model, rel=0.01)
            assert float(rates["reverse"](jnp.asarray(step))) == pytest.approx(reverse, rel=0.025)
    assert (config.epochs, config.optim.cooldown_epochs) == (125, 10)
    assert float(rates["model"](jnp.asarray(134 * epoch))) == pytest.approx(1e-5)


def test_recipe_is_the_papers() -> None:
    config = load_config("configs/imagenet_sit_tiny.py")
    assert (config.batch_size, config.optim.weight_decay, config.optim.eps) == (1024, 0.05, 1e-8)
    assert (config.loss.token, config.loss.logits, config.loss.temperature) == (2.0, 2.0, 1.0)
    assert (config.mix.mixup, config.mix.cutmix, config.mix.switch, config.mix.mode) == (0.8, 1.0, 0.5, "batch")
    assert (config.augment.rand_augment, config.augment.erase, config.augment.repeats) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        3,
    )
    assert (config.loss.label_smoothing, config.data.crop_fraction, config.data.interpolation) == (
        0.1,
        0.875,
        "bicubic",
    )
    drop_paths = [load_config(f"configs/imagenet_sit_{s}.py").model.drop_path for s in ("tiny", "small", "large")]
    assert drop_paths == [0.0, 0.1, 0.3]
    large = load_config("configs/imagenet_sit_large.py")
    assert (large.augment.rand_augment, large.model.architecture.image_size) == ("rand-m9-n3-mstd0.5-inc1", 288)


def test_arguments_of_pages() -> None:
    assert load_config("configs/imagenet_deit_small_sit.py:0.7").model.name == "deit_small_sit_0.7"
    assert load_config("configs/folder.py:64").model.architecture.image_size == 64
    scratch = load_config("configs/imagenet_lvvit_small.py:scratch")
    assert (scratch.epochs, scratch.init) == (300, "random")
    assert load_config("configs/imagenet_lvvit_small.py").init == "runs/lvvit_small_pretrained"


def test_rate_follows_the_batch() -> None:
    small = load_config("configs/imagenet_sit_tiny.py", ["--config.batch_size=256"])
    np.testing.assert_allclose(small.scaled_optim.lr, 1e-4)
    fixed = load_config("configs/imagenet_sit_tiny.py", ["--config.batch_size=256", "--config.optim.lr_batch_size=0"])
    np.testing.assert_allclose(fixed.scaled_optim.lr, 2e-4)
