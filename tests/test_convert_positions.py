"""Which grid a table of positions is for, and whether the class token has one of them."""

import json
import pathlib
from typing import Any

import numpy as np
import original_models
import pytest
import safetensors.numpy
import torch
from test_convert import PLAIN
from test_other_stems import CONV7, SCALED, torch_model

from sit_jax.cli import app as cli
from sit_jax.config import ModelConfig, TeacherConfig
from sit_jax.errors import UserError
from sit_jax.io.convert.initial import initial_weights
from sit_jax.io.load import read_weights
from sit_jax.models.architecture import Architecture
from sit_jax.training.init import given_teacher

HEADS = {"num_heads": 2}


def write(folder: pathlib.Path, count: int, config: dict[str, Any] | None = None, **state: Any) -> pathlib.Path:
    """A file of timm's with so many positions for patches of 8 pixels, and a `config.json` beside it."""
    scaled, distilled = state.get("scaled", False), state.get("distilled", False)
    values = {key: value.numpy() for key, value in torch_model(SCALED if scaled else PLAIN).state_dict().items()}
    rng = np.random.default_rng(0)
    values["pos_embed"] = rng.normal(size=(1, count, 16)).astype(np.float32)
    if distilled:
        values |= {"dist_token": values["cls_token"] + 1, "head_dist.weight": values["head.weight"] + 1}
        values |= {"head_dist.bias": values["head.bias"] + 1}
    safetensors.numpy.save_file(values, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def sized(height: int, width: int) -> dict[str, Any]:
    return {"architecture": "some_vit", "pretrained_cfg": {"input_size": [3, height, width]}}


@pytest.mark.parametrize(
    ("count", "config", "state", "side", "class_position"),
    [
        (17, None, {}, 4, True),
        (145, None, {}, 12, True),
        (18, None, {"distilled": True}, 4, True),
        (16, None, {"scaled": True}, 4, False),  # DeiT-III: layer scale, and no position for the class token.
        (17, None, {"scaled": True}, 4, True),
        (16, sized(32, 32), {}, 4, False),
        (17, sized(32, 32), {}, 4, True),
        (18, sized(32, 32), {"distilled": True}, 4, True),
        (16, {"architecture": "vit_x", "model_args": {"no_embed_class": True}}, {}, 4, False),
        (16, {"architecture": "deit3_small_patch8_32"}, {}, 4, False),
        (16, {"architecture": "vit_x", "model_args": {"img_size": 32}}, {}, 4, False),
        (16, {"image_size": 32}, {}, 4, False),
        # The model's own size comes before the one that its first weights were trained for.
        (17, {"architecture": "x", "model_args": {"img_size": [32, 32]}, "pretrained_cfg": {"input_size": [3, 64, 64]}},
         {}, 4, True),
    ],
)  # fmt: skip
def test_square_grids(
    count: int, config: Any, state: dict[str, Any], side: int, class_position: bool, tmp_path: pathlib.Path
) -> None:
    file = write(tmp_path, count, config, **state)
    weights = read_weights(file, HEADS)
    assert weights.arch.image_size == 8 * side
    table = safetensors.numpy.load_file(file)["pos_embed"]
    np.testing.assert_array_equal(weights.params["positions"][:, 1:], table[:, -(side**2) :])
    expected = table[:, :1] if class_position else np.zeros((1, 1, 16), np.float32)
    np.testing.assert_array_equal(weights.params["positions"][:, :1], expected)


@pytest.mark.parametrize(
    ("count", "config", "state", "named"),
    [
        # A class token and 13x15 patches, or 14x14 patches without its position: only the file's owner knows.
        (196, None, {}, "--model.image_size 112"),
        (25, None, {}, "--model.image_size 40"),  # 4x6 or 5x5.
        (144, None, {}, "--model.image_size 96"),  # 11x13 or 12x12.
        (196, sized(104, 120), {}, "104x120"),
        (25, sized(32, 48), {}, "32x48"),
        (17, sized(16, 64), {}, "16x64"),
        (145, sized(72, 128), {}, "72x128"),
        (145, {"input_size": [3, 72, 128], "mean": [0.5] * 3}, {}, "72x128"),
        (145, {"architecture": "vit_x", "model_args": {"img_size": [72, 128]}}, {}, "72x128"),
        (196, {"architecture": "vit_tiny_patch8_112"}, {}, "196"),
        (196, {"architecture": "x", "model_args": {"no_embed_class": False}}, {}, "196"),
        (197, {"architecture": "x", "model_args": {"no_embed_class": True}}, {}, "197"),
        (17, sized(64, 64), {}, "image_size"),
        (17, sized(36, 36), {}, "image_size"),  # Not a whole number of patches.
        (17, {"image_size": 64}, {}, "image_size"),
        (17, {"image_size": [16, 64]}, {}, "image_size"),
        (196, None, {"distilled": True}, "196"),  # 194 is not a square.
        (17, None, {"distilled": True}, "17"),  # A class position and none for the distillation token: of no program.
        (18, None, {}, "18"),
        (18, {"architecture": "x", "pretrained_cfg": {"input_size": [3, 32, 32]}}, {}, "image_size"),
        (24, None, {}, "24"),
    ],
)  # fmt: skip
def test_what_is_refused(count: int, config: Any, state: dict[str, Any], named: str, tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, count, config, **state)
    with pytest.raises(UserError) as caught:
        read_weights(file, HEADS)
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_option_decides(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, 25)
    command = ["convert", str(file), str(tmp_path / "out"), "--model.num_heads=2"]
    assert cli.main([*command, "--model.image_size=48"]) == 2
    assert "model.image_size" in capsys.readouterr().err
    assert cli.main([*command, "--model.image_size=40"]) == 0
    assert "no class position" in capsys.readouterr().out
    weights = read_weights(tmp_path / "out")
    assert weights.arch.image_size == 40
    assert not weights.params["positions"][:, 0].any()
    # The option comes before the config.json.
    write(tmp_path, 25, sized(32, 48))
    assert cli.main([*command, "--model.image_size=40", "--force"]) == 2
    write(tmp_path, 25, {"architecture": "vit_x", "model_args": {"img_size": 48}})
    assert cli.main([*command, "--model.image_size=40", "--force"]) == 0


def test_init_and_teachers(tmp_path: pathlib.Path) -> None:
    """A teacher's section describes the file's model; what starts from it may be of any size."""
    arch = Architecture(image_size=40, patch_size=8, num_classes=5, dim=16, depth=2, num_heads=2)
    file = write(tmp_path, 25)
    with pytest.raises(UserError, match=r"--model\.image_size 40"):
        initial_weights(file, arch)
    variables = given_teacher(TeacherConfig(model=ModelConfig(architecture=arch), run=str(file)), "teacher")
    assert not variables["params"]["positions"][:, 0].any()


def test_google_research(tmp_path: pathlib.Path) -> None:
    arrays = original_models.google(PLAIN)
    key = "Transformer/posembed_input/pos_embedding"
    for count, config, options in (
        (16, None, {}),
        (16, None, {"image_size": 32}),
        (17, None, {"image_size": 40}),
        (17, sized(16, 64), {}),
        (17, sized(40, 40), {}),
    ):
        arrays[key] = np.ones((1, count, 16), np.float32)
        original_models.save_npz(tmp_path / "x.npz", arrays)
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"positions|16x64"):
            read_weights(tmp_path / "x.npz", options)


def test_other_layouts(tmp_path: pathlib.Path) -> None:
    """Their class token always has a position, and the config.json must agree with it."""
    torch.save(torch_model(CONV7).state_dict(), tmp_path / "x.pth")
    fields = original_models.options(CONV7)
    for config, options, named in (
        (sized(64, 64), {}, "config.json"),
        (sized(16, 64), {}, "16x64"),
        ({}, {"image_size": 64}, "image_size"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=named):
            read_weights(tmp_path / "x.pth", {**fields, **options})
    (tmp_path / "config.json").write_text(json.dumps(sized(32, 32)))
    assert read_weights(tmp_path / "x.pth", {**fields, "image_size": 32}).arch == CONV7
