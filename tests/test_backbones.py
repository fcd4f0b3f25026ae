"""Backbones of other libraries: what they compute is what their library computes."""

import dataclasses
import pathlib
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import safetensors.numpy
import torch
from PIL import Image

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.export import source_layout, torch_model
from sit_jax.io.export.export import export_model
from sit_jax.io.load import read_weights
from sit_jax.io.model_folder import WEIGHTS
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.pool import Pool
from sit_jax.models.reducers.base import Cues, Place, Reduced, merge
from sit_jax.models.rotary import grid_coordinates, merge_coordinates

BACKBONES = pathlib.Path("tests/golden/backbones")
NAMES = sorted(path.parent.name for path in BACKBONES.glob("*/expected.npz"))
# A file of OpenCLIP says neither.
OPTIONS: dict[str, dict[str, Any]] = {"open_clip": {"num_heads": 2, "activation": "gelu"}}


def source(name: str) -> pathlib.Path:
    """What `read_weights` takes: the folder, or the file that is no folder's model."""
    npz = BACKBONES / name / "model.npz"
    return npz if npz.exists() else BACKBONES / name


def outputs(model: Any, pixels: np.ndarray) -> dict[str, np.ndarray]:
    images = pixels.transpose(0, 2, 3, 1)
    found = model.features(images)
    tokens = jnp.concatenate([found.prefix_tokens, found.patch_tokens], axis=1)
    values = {"tokens": tokens, "pooled": found.pooled, "embedding": found.pooled, "logits": model(images)}
    return {name: np.asarray(value) for name, value in values.items()}


@pytest.mark.parametrize("name", NAMES)
def test_of_another_library(name: str, tmp_path: pathlib.Path) -> None:
    expected = dict(np.load(BACKBONES / name / "expected.npz"))
    model = read_weights(source(name), OPTIONS.get(name))
    pixels = expected.pop("pixels")
    mine = outputs(model, pixels)
    if name == "hf_clip":
        del expected["tokens"]  # Before the last norm.
    if not model.arch.num_classes:
        expected.pop("logits", None)  # timm's logits of a model without a head are the features.
    assert expected.keys() & mine.keys()
    for key in expected.keys() & mine.keys():
        bound = 2e-6 * np.abs(expected[key]).max()
        np.testing.assert_allclose(mine[key], expected[key], rtol=0, atol=bound, err_msg=key)
    model.save(tmp_path / "saved")
    again = sit_jax.load(tmp_path / "saved")
    assert again.arch == model.arch
    jax.tree.map(np.testing.assert_array_equal, again.variables, model.variables)
    with torch.no_grad():
        logits, found = torch_model.load(tmp_path / "saved")(torch.from_numpy(pixels), return_outputs=True)
    tokens = torch.cat([found.prefix_tokens, found.patch_tokens], 1)
    theirs = {"tokens": tokens, "pooled": found.features, "embedding": found.features, "logits": logits}
    for key in expected.keys() & mine.keys():
        bound = 1e-6 * np.abs(expected[key]).max()
        np.testing.assert_allclose(theirs[key], expected[key], rtol=0, atol=bound, err_msg=key)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"hf_deit_one_head"}))
def test_the_way_back(name: str, tmp_path: pathlib.Path) -> None:
    model = read_weights(source(name), OPTIONS.get(name))
    source_layout.save(tmp_path / "back", model, source(name))
    back = safetensors.numpy.load_file(tmp_path / "back" / WEIGHTS)
    is_folder = source(name).is_dir()
    given = safetensors.numpy.load_file(source(name) / WEIGHTS) if is_folder else dict(np.load(source(name)))
    assert given.keys() == back.keys()
    for key, value in given.items():
        np.testing.assert_array_equal(back[key], value, strict=True)
    config = pathlib.Path("config.json")
    assert (tmp_path / "back" / config).exists() == (BACKBONES / name / config).exists()


def test_layouts_that_cannot_hold_a_model(tmp_path: pathlib.Path) -> None:
    model = read_weights(BACKBONES / "hf_deit_one_head")
    assert (model.vit.registers, model.vit.distillation_token) == (1, False)
    with pytest.raises(UserError, match="added in this layout"):
        source_layout.save(tmp_path / "back", model, BACKBONES / "hf_deit_one_head")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["timm_registers", "big_vision_vit"])
def test_a_trained_position_of_the_class_token_is_part_of_it(name: str, tmp_path: pathlib.Path) -> None:
    model = read_weights(source(name))
    positions = np.asarray(model.params["positions"]).copy()
    assert not positions[:, 0].any()
    positions[:, 0] += np.random.default_rng(0).normal(size=16)
    model = dataclasses.replace(model, variables={"params": {**model.params, "positions": positions}})
    source_layout.save(tmp_path / "back", model, source(name))
    pixels = np.load(BACKBONES / name / "expected.npz")["pixels"]
    options = None if (tmp_path / "back" / "config.json").exists() else {"image_size": 32}
    mine, theirs = (outputs(x, pixels)["logits"] for x in (model, read_weights(tmp_path / "back", options)))
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["hf_dinov3", "timm_gap_registers", "hf_siglip"])
def test_a_slimmed_backbone_goes_back_and_opens(name: str, tmp_path: pathlib.Path) -> None:
    teacher = read_weights(BACKBONES / name)
    arch = dataclasses.replace(teacher.vit, stage_blocks=(1, 1), keep_ratio=0.5)
    student = random_weights.draw(arch)
    source_layout.save(tmp_path / "back", student, BACKBONES / name)
    again = sit_jax.load(tmp_path / "back")
    assert again.arch == arch
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)
    given, back = (safetensors.numpy.load_file(path / WEIGHTS) for path in (BACKBONES / name, tmp_path / "back"))
    assert {key: value.shape for key, value in given.items()} == {key: value.shape for key, value in back.items()}
    other = random_weights.draw(dataclasses.replace(arch, image_size=64))
    with pytest.raises(UserError, match="image_size"):
        source_layout.save(tmp_path / "other", other, BACKBONES / name)
    assert not (tmp_path / "other").exists()


def test_a_backbone_without_a_head_predicts_no_classes() -> None:
    model = sit_jax.load(BACKBONES / "hf_dinov2")
    with pytest.raises(UserError, match="without a head"):
        model.logits(np.zeros((1, 32, 32, 3), np.uint8))
    pixels = random_weights.pixels(model.vit, 2)
    np.testing.assert_allclose(model(pixels), model.features(pixels).pooled, rtol=0, atol=1e-5)


def test_commands_on_a_backbone_without_a_head(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = dataclasses.replace(ROTARY, num_classes=0, stage_blocks=(1, 2), keep_ratio=0.5)
    random_weights.draw(arch).save(tmp_path / "slimmed")
    image = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(image)
    assert cli.main(["predict", str(tmp_path / "slimmed"), str(image)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "without a head" in line
    assert cli.main(["visualize", str(tmp_path / "slimmed"), str(image), "--output", str(tmp_path / "maps")]) == 0
    assert list((tmp_path / "maps").iterdir())


@pytest.mark.parametrize(("name", "field"), [("timm_dinov3", "positions"), ("timm_clip", "pre_norm")])
def test_what_a_state_dict_of_a_plain_vit_cannot_hold(name: str, field: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=field):
        export_model(BACKBONES / name, tmp_path / "x.safetensors", "timm")
    assert list(tmp_path.iterdir()) == []


def test_a_slimmed_backbone_in_torch(tmp_path: pathlib.Path) -> None:
    changes: dict[str, Any] = {
        "pool": "map",
        "registers": 2,
        "mlp": "swiglu",
        "mlp_ratio": 2.0,
        "projection": 7,
        "norm_eps": 1e-3,
    }
    arch = dataclasses.replace(ROTARY, **changes, stage_blocks=(1, 1, 1), keep_ratio=0.5)
    model = random_weights.draw(arch)
    model.save(tmp_path / "saved")
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    mine, outputs = jax.jit(model.module.apply)(model.variables, images)
    with torch.no_grad():
        theirs, found = torch_model.load(tmp_path / "saved")(
            torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), return_outputs=True
        )
    np.testing.assert_allclose(theirs, mine, atol=1e-5)
    for key in ("features", "prefix_tokens", "patch_tokens"):
        np.testing.assert_allclose(getattr(found, key), getattr(outputs, key), atol=2e-5)


ROTARY = Architecture(
    image_size=(32, 48),
    patch_size=8,
    dim=32,
    depth=3,
    num_heads=2,
    num_classes=3,
    positions="rope",
    registers=2,
    key_bias=False,
)


def test_rotary_positions_of_merged_tokens() -> None:
    coordinates = grid_coordinates((2, 3))
    np.testing.assert_allclose(coordinates[0, 4], [0.5, 0.0])
    # The second token is half of each of the first and the last patch, weighted one to three.
    assignment = jnp.zeros((1, 6, 2)).at[0, 2, 0].set(0.1).at[0, 0, 1].set(0.5).at[0, 5, 1].set(1.5)
    merged = merge_coordinates(assignment, coordinates)
    expected = [coordinates[0, 2], 0.25 * coordinates[0, 0] + 0.75 * coordinates[0, 5]]
    np.testing.assert_allclose(merged[0], np.stack(expected), atol=1e-6)


def test_rotary_model_that_keeps_all_tokens_is_its_teacher() -> None:
    student = dataclasses.replace(ROTARY, stage_blocks=(1, 2), keep_ratio=1.0, reducer="test_backbones:Identity")
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    variables = jax.jit(build_model(ROTARY).init)(jax.random.key(0), images)
    (mine, _), (theirs, _) = (jax.jit(build_model(arch).apply)(variables, images) for arch in (student, ROTARY))
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    # Tokens in another order have their positions with them.
    turned = dataclasses.replace(student, reducer="test_backbones:Reversal")
    np.testing.assert_allclose(jax.jit(build_model(turned).apply)(variables, images)[0], theirs, atol=1e-5)


class Identity(nn.Module):
    """Keeps all tokens."""

    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[Place] = "behind_block"
    dtype: Any = jnp.float32

    def __call__(self, cues: Cues, kept: int) -> Reduced:
        return merge(cues, jnp.broadcast_to(jnp.eye(kept), (len(cues.tokens), kept, kept)))


class Reversal(Identity):
    """Keeps all tokens, in reverse order."""

    def __call__(self, cues: Cues, kept: int) -> Reduced:
        return merge(cues, jnp.broadcast_to(jnp.eye(kept)[::-1], (len(cues.tokens), kept, kept)))


def test_mean_pool_counts_merged_patches() -> None:
    arch = dataclasses.replace(ROTARY, pool="avg", num_classes=0)
    prefix, patches = jnp.zeros((1, 3, 32)), jnp.arange(2.0)[None, :, None] * jnp.ones((1, 2, 32))
    pooled: Any = Pool(arch).apply({}, prefix, patches, jnp.array([[1.0, 3.0]]))
    np.testing.assert_allclose(pooled, 0.75)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"class_token": False}, "class_token"),
        ({"norm_after_pool": True}, "norm_after_pool"),
        ({"image_size": (32, 50)}, "image_size"),
        ({"num_heads": 16}, "positions"),
        ({"distillation_token": True}, "distillation_token"),
    ],
)
def test_impossible_architectures(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(ROTARY, **fields)
    assert caught.value.key == key


def test_squares_have_one_form() -> None:
    assert dataclasses.replace(ROTARY, image_size=(32, 32)) == dataclasses.replace(ROTARY, image_size=32)
