"""The pages in configs/: a step of each kind traces, and the paper's recipe has the paper's learning rates."""

import jax
import jax.numpy as jnp
import pytest

from sit_jax.analysis.plan import abstract_arguments
from sit_jax.cli.config_file import load_config
from sit_jax.config import Config, JsonObject
from sit_jax.config.config_dict import from_config_dict, to_dict
from sit_jax.errors import ConfigError
from sit_jax.models.architecture import Architecture
from sit_jax.parallel.sharding import make_mesh
from sit_jax.training.step import make_train_spec, train_step

# One of each architecture and loss; test_cli.py loads every page.
PAGES = ["digits", "folder", "imagenet_sit_tiny", "imagenet_sit_large", "imagenet_deit_small_sit", "compare_imagenet"]
IMAGENET_TRAIN = 1_281_167


def shallow(config: Config) -> Config:
    """The config with two blocks per stage at most: tracing two dozen takes long, and they are all alike."""
    values = to_dict(config)
    stages = [min(2, x) for x in values["model"]["stage_blocks"]]
    values["model"] |= {"depth": sum(stages) or 2, "stage_blocks": stages}
    if values["teacher"]:
        values["teacher"]["model"]["depth"] = sum(stages)
    return from_config_dict(values)


@pytest.mark.parametrize("page", [*PAGES, "imagenet_lvvit_tiny:token_labelling"])
def test_step_traces(page: str) -> None:
    config = shallow(load_config(page).with_classes(12))
    arguments = abstract_arguments(config, make_mesh(devices=jax.devices()[:1]))
    spec = make_train_spec(config, steps_per_epoch=100)
    _, metrics = jax.eval_shape(lambda *x: train_step(spec, *x), *arguments)
    expected = {"loss", "classification", "accuracy", "grad_norm", "lr/model"}
    if config.loss.token > 0:
        expected |= {"token", "logits", "lr/rtsm"}
    if config.loss.token_label > 0:
        expected |= {"token_label"}
    assert set(metrics) == expected
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_learning_rates_of_the_papers_recipe() -> None:
    config = load_config("configs/imagenet_sit_tiny.py")
    epoch = IMAGENET_TRAIN // config.batch_size
    rates = make_train_spec(config, epoch).rates
    expected = {0: (4.0e-4, 2.0e-3), 62: (2.08e-4, 1.02e-3), 100: (4.7e-5, 2.0e-4), 125: (1e-5, 1e-5)}
    for number, (model, reverse) in expected.items():
        for step in (number * epoch, number * epoch + epoch - 1):  # Set per epoch.
            assert float(rates["model"](jnp.asarray(step))) == pytest.approx(model, rel=0.01)
            assert float(rates["rtsm"](jnp.asarray(step))) == pytest.approx(reverse, rel=0.025)
    assert float(rates["model"](jnp.asarray(134 * epoch))) == pytest.approx(1e-5)


def test_recipe_is_the_papers() -> None:
    config = load_config("configs/imagenet_sit_tiny.py")
    assert (config.epochs, config.optim.cooldown_epochs, config.batch_size) == (125, 10, 1024)
    expected: JsonObject = {
        "optim": {"weight_decay": 0.05, "eps": 1e-8},
        "loss": {"token": 2.0, "logits": 2.0, "temperature": 1.0, "label_smoothing": 0.1},
        "mix": {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "mode": "batch"},
        "augment": {"rand_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "repeats": 3},
        "data": {"crop_fraction": 0.875, "interpolation": "bicubic"},
    }
    values = to_dict(config)
    assert {name: {key: values[name][key] for key in section} for name, section in expected.items()} == expected
    drop_paths = {"tiny": 0.0, "xsmall": 0.1, "small": 0.1, "medium": 0.1, "large": 0.3}
    for size, drop_path in drop_paths.items():
        large = load_config(f"configs/imagenet_sit_{size}.py")
        assert (large.optim, large.model.drop_path) == (config.optim, drop_path)
    assert (large.augment.rand_augment, large.model.architecture.image_size) == ("rand-m9-n3-mstd0.5-inc1", 288)


def test_arguments_of_pages() -> None:
    assert load_config("configs/imagenet_deit_small_sit.py:0.7").model.name == "deit_small_sit_0.7"
    shapes = {size: load_config(f"configs/folder.py:{size}").model.architecture for size in (12, 28, 32, 48, 64)}
    assert all(isinstance(x, Architecture) and x.token_counts[-1] >= 1 for x in shapes.values())
    assert [x.image_size for x in shapes.values()] == list(shapes)
    scratch = load_config("configs/imagenet_lvvit_small.py:scratch")
    assert (scratch.epochs, scratch.init) == (300, "random")
    assert load_config("configs/imagenet_lvvit_small.py").init == "runs/lvvit_small_pretrained"


@pytest.mark.parametrize("text", ["32x48", "(32, 48)", "32,48"])
def test_height_and_width_replace_one_number(text: str) -> None:
    overrides = [f"--config.{section}.image_size={text}" for section in ("model", "teacher.model")]
    config = load_config("configs/fashion_mnist.py", overrides)
    architecture = config.model.architecture
    assert isinstance(architecture, Architecture)
    assert architecture.image_shape == (32, 48)


@pytest.mark.parametrize(
    ("key", "value"),
    [("augment.rand_augment", "rand-x9"), ("augment.flip", "1.5"), ("data.std.1", "(0.2,0.0,0.2)")],
)
def test_wrong_values_are_named_by_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("configs/folder.py:64", [f"--config.{key.removesuffix('.1')}={value}"])
    assert caught.value.key == key
