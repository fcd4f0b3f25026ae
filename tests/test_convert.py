"""Weights of other programs, read, written back and run."""

import argparse
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import golden_files
import numpy as np
import original_models
import pytest
import random_weights
import safetensors.numpy
import safetensors.torch
import torch
from golden_files import TRAINED
from test_other_stems import CONV7, SCALED, torch_model

from sit_jax.cli import app as cli
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.convert.adapt import interpolate
from sit_jax.io.convert.infer_config import infer
from sit_jax.io.convert.read import Options
from sit_jax.io.convert.resolve_config import resolve
from sit_jax.io.convert.sit_names import to_original
from sit_jax.io.export import source_layout
from sit_jax.io.load import load, read_weights
from sit_jax.models.architecture import Architecture
from sit_jax.models.variants import VARIANTS

GOLDEN = (*TRAINED, "dist_token")
PLAIN = Architecture(image_size=32, patch_size=8, num_classes=5, dim=16, depth=2, num_heads=2)
HEADS = {"num_heads": 2}


def words(arch: Architecture) -> list[str]:
    return [f"--model.{key}={value}" for key, value in original_models.options(arch).items()]


def assert_same(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].dtype == value.dtype
        assert mine[key].shape == value.shape, key
        assert mine[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_round_trips_bit_for_bit(name: str, tmp_path: pathlib.Path) -> None:
    golden = golden_files.load(name)
    theirs = original_models.golden_weights(name)
    means = [key for key in theirs if key.endswith("running_mean")]
    counters = {  # More than float32 holds.
        key.replace("running_mean", "num_batches_tracked"): np.array(2**40 + index) for index, key in enumerate(means)
    }
    source = original_models.save_torch(tmp_path / "theirs.pth", {**theirs, **counters})
    folder, back, other = tmp_path / "folder", tmp_path / "back.pth", tmp_path / "back.safetensors"
    assert cli.main(["convert", str(source), str(folder), *words(golden.arch)]) == 0
    for dest in (back, other):
        assert cli.main(["convert", str(folder), str(dest)]) == 0
    loaded = torch.load(back, weights_only=True)
    assert_same({key: value.numpy() for key, value in loaded.items()}, {**theirs, **counters})
    assert_same(safetensors.numpy.load_file(other), {**theirs, **counters})
    assert_same(safetensors.numpy.load_file(folder / "model.safetensors"), theirs)
    assert read_weights(folder).vit.token_counts == golden.arch.token_counts
    assert read_weights(folder).vit.stage_blocks == golden.arch.stage_blocks
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in (source, folder, back, other))


@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_prefixes_and_averages(legacy: bool, tmp_path: pathlib.Path) -> None:
    golden = golden_files.load("lvvit_4c")
    theirs = original_models.golden_weights("lvvit_4c")
    source = original_models.save_torch(tmp_path / "x.pth", original_models.checkpoint(theirs), legacy)
    lines: list[str] = []
    options = Options(original_models.options(golden.arch))
    weights = read_weights(source, options=options, log=lines.append)
    assert "'state_dict'" in lines[0]
    assert "'state_dict_ema'" in lines[0]
    assert lines[1].startswith("found: SiT original layout, student conv4 stem, width 16, depth 5 with RTSMs")
    assert_same(to_original({**weights.variables, "rtsm": weights.rtsm}, weights.vit), theirs)
    averaged = read_weights(source, options=options._replace(ema=True))
    np.testing.assert_array_equal(averaged.params["norm"]["bias"], theirs["norm.bias"] + 1)
    without = read_weights(source, options=options._replace(rtsm=False), log=lines.append)
    assert without.rtsm == {}
    assert lines[-1] == "changed: RTSMs left out"


def doubled(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in state.items()}


def averaged(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As PyTorch's `AveragedModel` stores it."""
    return {"n_averaged": np.asarray(3), **{f"module.{key}": value for key, value in state.items()}}


def wrapped(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of a compiled model with compiled blocks."""
    compiled = {re.sub(r"^(blocks\.\d+)", r"\1._orig_mod", key): value for key, value in state.items()}
    return {f"net._orig_mod.{key}": value for key, value in compiled.items()}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (wrapped, ""),
        (averaged, ""),
        (lambda state: {"student": state, "epoch": 3}, ""),
        (lambda state: {f"backbone.{key}".replace("backbone.head", "head"): value for key, value in state.items()}, ""),
        (doubled, "student., teacher."),
        (lambda state: {"student": state, "teacher": state}, "under student, teacher"),
        (lambda state: {"model": {"state_dict": state}}, ""),
        (lambda state: {**state, "criterion.weight": np.zeros(3, np.float32)}, "left over: criterion.weight"),
        (lambda state: {f"m.{key}": x for key, x in state.items()} | {"norm.bias": state["norm.bias"]}, "several"),
    ],
)
def test_names_as_programs_write_them(change: Callable[[Any], Any], fact: str, tmp_path: pathlib.Path) -> None:
    theirs = original_models.state_dict(PLAIN)
    path = original_models.save_torch(tmp_path / "x.pth", change(theirs))
    if not fact:
        assert_same(to_original(read_weights(path, HEADS).variables, PLAIN), theirs)
        return
    with pytest.raises(UserError, match=re.escape(fact)) as raised:
        read_weights(path, HEADS)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


TOKEN_REDUCTION = dataclasses.replace(PLAIN, image_size=64, depth=4, stage_blocks=(1, 2, 1), keep_ratio=0.7)


@pytest.mark.parametrize("args", [{"reduction_loc": [1, 3], "keep_rate": [0.7]}, {}], ids=["args", "no args"])
def test_token_reduction(args: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """SiT as the TokenReduction repository trains it: the blocks of its modules are in its arguments alone."""
    theirs = original_models.state_dict(TOKEN_REDUCTION)
    renamed = {re.sub(r"^tsm\.", "cluster_layers.", key): value for key, value in theirs.items()}
    checkpoint: dict[str, Any] = {"model": renamed, "model_ema": {key: value + 1 for key, value in renamed.items()}}
    checkpoint |= {"args": argparse.Namespace(model="sit", **args), "scaler": None, "ema_best": False}
    path, lines = original_models.save_torch(tmp_path / "x.pth", checkpoint), list[str]()
    fields = {**HEADS, **({} if args else {"stage_blocks": TOKEN_REDUCTION.stage_blocks})}
    weights = read_weights(path, fields, log=lines.append)
    assert "no RTSMs" in lines[-1]
    open_fields = {"residual_scale": 1.0, "norm_eps": 1e-6, "stage_blocks": TOKEN_REDUCTION.stage_blocks}
    ours = read_weights(original_models.save_torch(tmp_path / "tsm.pth", theirs), {**HEADS, **open_fields})
    assert weights.arch == ours.arch
    assert weights.vit.token_counts == TOKEN_REDUCTION.token_counts
    assert_same(to_original(weights.variables, weights.vit), theirs)
    if not args:
        with pytest.raises(UserError, match=r"--model\.stage_blocks"):
            read_weights(path, HEADS)
    # Other methods of that repository have modules of that name, too, which are not SiT's.
    others = {key: value for key, value in renamed.items() if ".weight.3." not in key}
    with pytest.raises(UserError, match=r"left over: cluster_layers\.0"):
        read_weights(original_models.save_torch(tmp_path / "sinkhorn.pth", others), HEADS)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *itertools.product(["pth", "safetensors"], [torch.float16, torch.bfloat16, torch.float64]),
        *[("legacy.pth", torch.bfloat16), ("pth", torch.float8_e4m3fn), ("pth", torch.float8_e5m2)],
    ],
)
def test_types(kind: str, dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    state = {key: (1.1 * value.double()).to(dtype) for key, value in torch_model(SCALED).state_dict().items()}
    path = tmp_path / f"x.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
    model = read_weights(path, HEADS)
    kernel = model.params["blocks_1"]["mlp"]["fc1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, state["blocks.1.mlp.fc1.weight"].float().numpy().T)
    source_layout.save(tmp_path / "back", model, path)
    back = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    for key, value in state.items():
        expected = value.float() if value.itemsize == 1 else value
        assert back[key].dtype == expected.dtype
        assert torch.equal(back[key], expected)


def test_lvvit_of_token_labelling(tmp_path: pathlib.Path) -> None:
    theirs = original_models.state_dict(CONV7)
    lines: list[str] = []
    source = original_models.save_torch(tmp_path / "x.pth.tar", theirs)
    weights = read_weights(source, original_models.options(CONV7), log=lines.append)
    assert lines[0].startswith("found: token-labelling layout (LV-ViT), teacher conv7 stem, width 12, depth 2")
    assert weights.arch == CONV7
    assert_same(to_original(weights.variables, weights.vit), theirs)


@pytest.mark.parametrize(
    ("distilled", "class_position", "gamma"), [(True, True, "ls"), (False, False, "gamma_1"), (False, True, "ls")]
)
@pytest.mark.parametrize("wrapper", ["", "model", "model_ema"])
def test_timm_and_deit(distilled: bool, class_position: bool, gamma: str, wrapper: str, tmp_path: pathlib.Path) -> None:
    arch = dataclasses.replace(SCALED, distillation_token=distilled)
    expected = original_models.state_dict(arch)
    state, positions = dict(expected), expected["pos_embed"]
    if distilled:
        position = state.pop("dist_pos_embed")
        state["pos_embed"] = np.concatenate([positions[:, :1], position, positions[:, 1:]], axis=1)
    if not class_position:
        state["pos_embed"] = positions[:, 1:]
        expected["pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions[:, 1:]], axis=1)
    if gamma == "gamma_1":
        names = {f"blocks.{b}.ls{i}.gamma": f"blocks.{b}.gamma_{i}" for b in range(2) for i in (1, 2)}
        state = {names.get(key, key): value for key, value in state.items()}
    path = original_models.save_torch(tmp_path / "x.pth", {wrapper: state} if wrapper else state)
    weights = read_weights(path, HEADS)
    assert weights.arch == arch
    assert_same(to_original(weights.variables, arch), expected)


def test_google_research(tmp_path: pathlib.Path) -> None:
    path = original_models.save_npz(tmp_path / "ViT.npz", original_models.google(PLAIN))
    weights = read_weights(path)
    assert weights.arch == PLAIN
    assert_same(to_original(weights.variables, PLAIN), original_models.state_dict(PLAIN))
    # As google-research evaluates: pixels of a whole image, resized to a square, minus 127.5, over 127.5.
    images = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_fraction": 1, "resize": "stretch"}
    assert weights.metadata["preprocessing"] == images


@pytest.mark.parametrize("name", ["sit_xsmall", "sit_small", "sit_large", "lvvit_medium", "deit_tiny_sit_0.7"])
def test_named_models_are_recognised(name: str) -> None:
    arch = VARIANTS[name]
    shapes = original_models.shapes(arch, arch.is_slimmed)
    assert resolve(infer(shapes), {}, {}) == (arch, name)
    without = {key: shape for key, shape in shapes.items() if not key.startswith("rtsm.")}
    if name not in ("sit_xsmall", "sit_small"):
        assert resolve(infer(without), {}, {}).arch == arch
        return
    # These two differ in nothing but where the slimming modules stand.
    with pytest.raises(UserError, match=r"--model.stage_blocks 1,1,1,13 \(sit_xsmall\) or 9,3,2,2 \(sit_small\)"):
        resolve(infer(without), {}, {})
    assert resolve(infer(without), {}, {"name": name}).arch == arch
    assert resolve(infer(without), {}, {"stage_blocks": arch.stage_blocks}).arch == arch


def test_what_is_undecided_is_asked_for(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = original_models.save_torch(tmp_path / "x.pth", original_models.golden_weights("lvvit_4c"))
    assert cli.main(["convert", str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(f"--model.{key}" in error for key in ("num_heads", "residual_scale", "norm_eps"))
    assert error.count("\n") == 1
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "residual_scale": 2.0, "norm_eps": 1e-5}))
    assert read_weights(path).vit.residual_scale == 2.0
    assert read_weights(path, {"residual_scale": 3.0}).vit.residual_scale == 3.0
    assert cli.main(["convert", str(path), str(tmp_path / "out"), "--model.num_heads", "4"]) == 0
    assert read_weights(tmp_path / "out").vit.num_heads == 4
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": "two"}))
    with pytest.raises(UserError, match=r"model\.num_heads: .*two.*config\.json"):
        read_weights(path)


def test_changing_resolution_and_classes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = golden_files.load("lvvit_4c")
    source = original_models.save_torch(tmp_path / "x.pth", original_models.golden_weights("lvvit_4c"))
    change = ["--image_size", "96", "--num_classes", "3"]
    assert cli.main(["convert", str(source), str(tmp_path / "out"), *words(golden.arch), *change]) == 0
    out = capsys.readouterr().out
    old, new = golden.arch.grid[0], 96 // 16
    for fact in ("11 to 3 classes", "aux_head and head", f"{old}x{old} to {new}x{new} (bicubic)", "RTSMs left out"):
        assert fact in out
    weights = read_weights(tmp_path / "out")
    assert weights.vit.num_patches == new**2
    assert weights.vit.token_counts[1:] == golden.arch.token_counts[1:]
    assert weights.rtsm == {}
    theirs = original_models.golden_weights("lvvit_4c")["pos_embed"]
    np.testing.assert_array_equal(weights.params["positions"][:, :1], theirs[:, :1])
    grid = interpolate(theirs[0, 1:].reshape(old, old, -1), (new, new))
    np.testing.assert_array_equal(weights.params["positions"][0, 1:].reshape(grid.shape), grid)
    images = np.zeros((1, 96, 96, golden.arch.in_channels), np.float32)
    np.testing.assert_array_equal(weights(images), np.zeros((1, 3), np.float32))


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 12), (3, 10), (16, 1)])
def test_interpolation_is_pytorchs(old: int, new: int) -> None:
    grid = np.random.default_rng(0).normal(size=(old, old, 5)).astype(np.float32)
    theirs = torch.from_numpy(grid).double().permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(theirs, (new, new), mode="bicubic", align_corners=False)[0]
    np.testing.assert_allclose(interpolate(grid, (new, new)), expected.permute(1, 2, 0), rtol=0, atol=5e-7)


def test_ratios_whose_hidden_width_is_not_whole(tmp_path: pathlib.Path) -> None:
    arch = dataclasses.replace(PLAIN, dim=24, mlp_ratio=2.7)
    source = random_weights.draw(arch)
    source.save(tmp_path / "folder")
    assert source.params["blocks_0"]["mlp"]["fc1"]["kernel"].shape == (24, 64)
    assert cli.main(["convert", str(tmp_path / "folder"), str(tmp_path / "out")]) == 0
    assert load(tmp_path / "out").arch == arch


@pytest.mark.parametrize(
    ("options", "key"),
    [({"name": "deit_small"}, "model.name"), ({"name": "x"}, "model.name"), ({"depht": 3}, "model.depht")],
)
def test_options_that_do_not_fit(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(infer(original_models.shapes(VARIANTS["deit_base"])), {}, options)
    assert caught.value.key == key
