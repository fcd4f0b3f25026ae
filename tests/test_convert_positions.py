"""Which grid a table of positions is for, and whether the class token has one of them."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import original_models
import pytest
import safetensors.numpy
from test_convert import HEADS, PLAIN
from test_other_stems import CONV7

from sit_jax.config import ModelConfig, TeacherConfig
from sit_jax.errors import UserError
from sit_jax.io.convert.initial import initial_weights
from sit_jax.io.load import read_weights
from sit_jax.training.init import given_teacher

VIT = {"architecture": "vit_x"}
DISTILLED, SCALED = {"distillation_token": True}, {"layer_scale": True}


def write(folder: pathlib.Path, count: int, config: dict[str, Any] | None = None, **fields: Any) -> pathlib.Path:
    """A file of timm's with so many positions for patches of 8 pixels, and a `config.json` beside it."""
    values = original_models.state_dict(dataclasses.replace(PLAIN, **fields))
    values.pop("dist_pos_embed", None)
    values["pos_embed"] = np.random.default_rng(0).normal(size=(1, count, 16)).astype(np.float32)
    safetensors.numpy.save_file(values, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def sized(height: int, width: int) -> dict[str, Any]:
    return {**VIT, "pretrained_cfg": {"input_size": [3, height, width]}}


@pytest.mark.parametrize(
    ("count", "config", "fields", "class_position"),
    [
        (17, None, {}, True),
        (18, None, DISTILLED, True),
        (16, None, SCALED, False),  # DeiT-III: layer scale, and no position for the class token.
        (17, None, SCALED, True),
        (16, sized(32, 32), {}, False),
        (18, sized(32, 32), DISTILLED, True),
        (16, {**VIT, "model_args": {"no_embed_class": True}}, {}, False),
        (16, {"architecture": "deit3_small_patch8_32"}, {}, False),
        (16, {"image_size": 32}, {}, False),
        # The model's own size comes before the one that its first weights were trained for.
        (17, {**sized(64, 64), "model_args": {"img_size": [32, 32]}}, {}, True),
    ],
)
def test_square_grids(
    count: int, config: Any, fields: dict[str, Any], class_position: bool, tmp_path: pathlib.Path
) -> None:
    file = write(tmp_path, count, config, **fields)
    weights = read_weights(file, HEADS)
    assert weights.arch.image_size == 32
    table = safetensors.numpy.load_file(file)["pos_embed"]
    np.testing.assert_array_equal(weights.params["positions"][:, 1:], table[:, -16:])
    expected = table[:, :1] if class_position else np.zeros((1, 1, 16), np.float32)
    np.testing.assert_array_equal(weights.params["positions"][:, :1], expected)


@pytest.mark.parametrize(
    ("count", "config", "fields", "named"),
    [
        # A class token and 13x15 patches, or 14x14 patches without its position: only the file's owner knows.
        (196, None, {}, "--model.image_size 112"),
        (196, sized(104, 120), {}, "104x120"),
        (145, {**VIT, "model_args": {"img_size": [72, 128]}}, {}, "72x128"),
        (196, {"architecture": "vit_tiny_patch8_112"}, {}, "196"),
        (197, {**VIT, "model_args": {"no_embed_class": True}}, {}, "197"),
        (17, sized(64, 64), {}, "image_size"),
        (17, sized(36, 36), {}, "image_size"),  # Not a whole number of patches.
        (17, None, DISTILLED, "17"),  # A class position and none for the distillation token: of no program.
        (18, None, {}, "18"),
    ],
)
def test_what_is_refused(count: int, config: Any, fields: dict[str, Any], named: str, tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, count, config, **fields)
    with pytest.raises(UserError) as caught:
        read_weights(file, HEADS)
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_option_decides(tmp_path: pathlib.Path) -> None:
    # The option comes before the config.json.
    with pytest.raises(UserError, match="image_size"):
        read_weights(write(tmp_path, 25), {**HEADS, "image_size": 48})
    file = write(tmp_path, 25, {**VIT, "model_args": {"img_size": 48}})
    weights = read_weights(file, {**HEADS, "image_size": 40})
    assert weights.arch.image_size == 40
    assert not weights.params["positions"][:, 0].any()


def test_init_and_teachers(tmp_path: pathlib.Path) -> None:
    """A teacher's section describes the file's model; what starts from it may be of any size."""
    arch = dataclasses.replace(PLAIN, image_size=40)
    file = write(tmp_path, 25)
    with pytest.raises(UserError, match=r"--model\.image_size 40"):
        initial_weights(file, arch)
    variables = given_teacher(TeacherConfig(model=ModelConfig(architecture=arch), run=str(file)), "teacher")
    assert not variables["params"]["positions"][:, 0].any()


def test_other_layouts(tmp_path: pathlib.Path) -> None:
    """Their class token always has a position, and the config.json must agree with it."""
    path = original_models.save_torch(tmp_path / "x.pth", original_models.state_dict(CONV7))
    fields = original_models.options(CONV7)
    for config, options, named in (
        (sized(64, 64), {}, "config.json"),
        (sized(16, 64), {}, "16x64"),
        ({}, {"image_size": 64}, "image_size"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=named):
            read_weights(path, {**fields, **options})
    (tmp_path / "config.json").write_text(json.dumps(sized(32, 32)))
    assert read_weights(path, {**fields, "image_size": 32}).arch == CONV7
