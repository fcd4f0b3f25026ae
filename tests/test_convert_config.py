"""What the `config.json` of weights says is used, or it is refused, and what it does not say is told."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import original_models
import pytest
import safetensors.numpy
from test_convert import HEADS, PLAIN
from test_other_stems import SCALED

from sit_jax.config import ModelConfig, TeacherConfig
from sit_jax.errors import UserError
from sit_jax.io.convert.convert import convert
from sit_jax.io.convert.initial import initial_weights
from sit_jax.io.convert.read import Options
from sit_jax.io.load import read_weights
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
from sit_jax.training.init import given_teacher

IMAGES = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 0.9}
OURS = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_fraction": 0.9, "resize": "crop"}
VIT = {"architecture": "vit_some_patch16_reg1_32"}


def read(
    folder: pathlib.Path, config: dict[str, Any], fields: dict[str, Any] | None = None, **state: Any
) -> tuple[Model, list[str]]:
    """The weights of a small timm model with a `config.json` beside them, and what the reader says."""
    lines: list[str] = []
    values = original_models.state_dict(state.get("arch", PLAIN))
    if state.get("headless"):
        values = {key: value for key, value in values.items() if not key.startswith("head.")}
    safetensors.numpy.save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    options = Options(fields or {}, num_classes=state.get("num_classes"))
    return read_weights(folder / "model.safetensors", options=options, log=lines.append), lines


@pytest.mark.parametrize(
    "config",
    [
        {**VIT, "model_args": {"num_heads": 4}},
        {**VIT, "num_heads": 4},
        {"model_type": "vit", "num_attention_heads": 4},
        {"architecture": {"num_heads": 4}},
        {"model": {"num_heads": 4, "drop_path": 0.1, "name": "x"}},
    ],
)
def test_heads(config: dict[str, Any], tmp_path: pathlib.Path) -> None:
    weights, lines = read(tmp_path, config)
    assert weights.vit.num_heads == 4
    assert not any("guess" in line or "not used" in line for line in lines)
    assert read(tmp_path, config, {"num_heads": 8})[0].vit.num_heads == 8


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({**VIT, "global_pool": "avgmax"}, "global_pool"),
        ({**VIT, "model_args": {"unheard_of": 1}}, "unheard_of"),
        ({**VIT, "model_args": [1]}, "model_args"),
        ({**VIT, "model_args": {"embed_dim": 32}}, "dim"),
        ({**VIT, "model_args": {"mlp_ratio": "wide"}}, "mlp_ratio"),
        ({**VIT, "model_args": {"patch_size": [8, 16]}}, "patch_size"),
        ({**VIT, "model_args": {"init_values": 1e-5}}, "layer_scale"),
        ({**VIT, "num_classes": 7}, "num_classes"),
        ({**VIT, "pretrained_cfg": {"input_size": [1, 32, 32]}}, "in_channels"),
        ({**VIT, "pretrained_cfg": {"input_size": 32}}, "input_size"),
        ({**VIT, "pretrained_cfg": {**IMAGES, "crop_mode": "border"}}, "crop_mode"),
        ({**VIT, "pretrained_cfg": {**IMAGES, "crop_mode": "squash"}}, "crop_mode"),  # crop_pct is 0.9.
        ({**VIT, "label_names": ["a", "b"]}, "class_names"),
        ({**VIT, "label_names": {"0": "a", "7": "b"}}, "label_names"),
        ({**IMAGES, "interpolation": "box"}, "interpolation"),
        ({"model_type": "bert"}, "model_type"),
        ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act"),
        ({"model_type": "vit", "hidden_size": 16, "intermediate_size": 48}, "mlp_ratio"),
        ({"model_type": "vit", "id2label": {"0": "a"}}, "num_classes"),
        ({"model": {"family": "regnet", "widths": [8]}}, "regnet"),
        ({"format": "sit_jax", "format_version": 2}, "version 2"),
    ],
)
def test_what_is_refused_by_name(config: dict[str, Any], key: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=key) as caught:
        read(tmp_path, config, HEADS)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_agrees_is_taken(tmp_path: pathlib.Path) -> None:
    args = {"img_size": 32, "patch_size": [8, 8], "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4}
    more = {"qkv_bias": True, "init_values": 1e-6, "class_token": True, "reg_tokens": 0, "fc_norm": None}
    rest = {"drop_path_rate": 0.1, "dynamic_img_size": True, "act_layer": "gelu", "norm_layer": None}
    config = {
        "architecture": "vit_tiny_patch8_32",
        "num_classes": 5,
        "num_features": 16,
        "global_pool": "token",
        "model_args": {**args, **more, **rest},
        "pretrained_cfg": {**IMAGES, "input_size": [3, 32, 32], "tag": "x", "pool_size": None, "license": "mit"},
    }
    weights, lines = read(tmp_path, config, arch=SCALED)
    assert weights.arch == SCALED
    assert weights.metadata["preprocessing"] == OURS
    assert weights.metadata["licence"] == "mit"
    assert not any("guess" in line or "not used" in line for line in lines)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (IMAGES, "preprocessing", OURS),
        (
            {**VIT, "pretrained_cfg": {**IMAGES, "crop_pct": 1.0, "crop_mode": "squash"}},
            "preprocessing",
            {**OURS, "crop_fraction": 1.0, "resize": "stretch"},
        ),
        ({"model": {}, "data": {"resize": "stretch", "name": "digits"}}, "preprocessing", {"resize": "stretch"}),
        (VIT, "preprocessing", None),
        ({**VIT, "label_names": list("abcde"), "label_descriptions": {"a": "ape"}}, "class_names", ["ape", *"bcde"]),
        ({"model_type": "vit", "id2label": dict(enumerate("abcde"))}, "class_names", list("abcde")),
    ],
)
def test_metadata(config: dict[str, Any], key: str, value: Any, tmp_path: pathlib.Path) -> None:
    assert read(tmp_path, config, HEADS)[0].metadata.get(key) == value


def test_a_head_that_is_not_there(tmp_path: pathlib.Path) -> None:
    config = {**VIT, "num_classes": 0, "label_names": list("abcde"), "num_heads": 2}
    weights, _ = read(tmp_path, config, headless=True, num_classes=3)
    assert weights.vit.num_classes == 3
    assert "class_names" not in weights.metadata
    np.testing.assert_array_equal(weights.params["head"]["kernel"], np.zeros((16, 3), np.float32))
    backbone, _ = read(tmp_path, config, headless=True)
    assert backbone.vit.num_classes == 0
    assert not backbone.params.keys() & {"head"}


@pytest.mark.parametrize("config", [{"mean": [0.5] * 3}, VIT, {"architecture": {"num_heads": 2}}])
def test_unused_keys_are_listed(config: dict[str, Any], tmp_path: pathlib.Path) -> None:
    _, lines = read(tmp_path, {**config, "n_layer": 12, "vocab_size": 50257}, HEADS)
    assert any("n_layer" in line and "vocab_size" in line and "config.json" in line for line in lines)


@pytest.mark.parametrize(
    ("config", "fields", "guess", "named"),
    [
        (VIT, {}, True, True),
        ({}, {"name": "deit_tiny"}, False, True),
        ({}, {"num_heads": 3}, False, True),
        ({"architecture": "vit_tiny_patch16_32"}, {}, False, True),
        ({**VIT, "model_args": {"num_heads": 3}}, {}, False, True),
        ({**VIT, "model_args": {"num_heads": 6}}, {}, False, False),  # Another model of the same shape.
    ],
)
def test_guesses_are_named(
    config: dict[str, Any], fields: dict[str, Any], guess: bool, named: bool, tmp_path: pathlib.Path
) -> None:
    """Only the shape of its tensors says how many heads a DeiT-Ti has."""
    tiny = Architecture(dim=192, depth=12, num_heads=3, num_classes=5, image_size=32)
    weights, lines = read(tmp_path, config, fields, arch=tiny)
    assert weights.vit.num_heads == (3 if named else 6)
    (found,) = (line for line in lines if line.startswith("found:"))
    assert ("guess" in found and "num_heads" in found) == guess
    assert ("deit_tiny" in found) == named


@pytest.mark.parametrize(
    ("images", "assumed"),
    [
        (IMAGES, None),
        ({"interpolation": "bilinear", "crop_pct": 0.9}, "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, "interpolation bicubic, crop_fraction 0.875"),
    ],
)
def test_assumptions_about_images(images: dict[str, Any], assumed: str | None, tmp_path: pathlib.Path) -> None:
    (tmp_path / "vit").mkdir()
    read(tmp_path / "vit", {**VIT, "pretrained_cfg": images}, HEADS)
    lines: list[str] = []
    convert(tmp_path / "vit", tmp_path / "model", Options(HEADS), force=False, log=lines.append)
    said = [line.partition(": ")[2] for line in lines if line.startswith("assumed")]
    assert said == ([assumed] if assumed else [])


# Which grid a table of positions is for, and whether the class token has one of them.
DISTILLED, LAYER_SCALE = {"distillation_token": True}, {"layer_scale": True}


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
        (16, None, LAYER_SCALE, False),  # DeiT-III: layer scale, and no position for the class token.
        (17, None, LAYER_SCALE, True),
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
