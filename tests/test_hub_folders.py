"""Folders of the Hugging Face Hub: sharded ones open, and damaged ones give one line each and write nothing."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_backbones import BACKBONES

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PATCHES = "embeddings.patch_embeddings.projection.weight"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A whole one, in two shards."""
    place = tmp_path / "hub"
    shutil.copytree(BACKBONES / "hf_dinov2", place)
    tensors = safetensors.numpy.load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        part = {name: tensors[name] for name in tensors if names[name] == shard}
        safetensors.numpy.save_file(part, place / shard)
    write(place / INDEX, {"metadata": {}, "weight_map": names})
    return place


def write(path: pathlib.Path, values: Any) -> None:
    path.write_text(values if isinstance(values, str) else json.dumps(values))


def edit(file: str, **changes: Any) -> Callable[[pathlib.Path], None]:
    """A change of top-level keys of a JSON file."""
    return lambda folder: write(folder / file, {**json.loads((folder / file).read_text()), **changes})


def point(name: str, shard: str) -> Callable[[pathlib.Path], None]:
    """A change of the file that the index names for a tensor."""

    def change(folder: pathlib.Path) -> None:
        edit(INDEX, weight_map={**json.loads((folder / INDEX).read_text())["weight_map"], name: shard})(folder)

    return change


def reshape(folder: pathlib.Path) -> None:
    for shard in SHARDS:
        tensors = safetensors.numpy.load_file(folder / shard)
        if PATCHES in tensors:
            safetensors.numpy.save_file({**tensors, PATCHES: np.zeros((16, 3, 4, 4), np.float32)}, folder / shard)


def cut(folder: pathlib.Path) -> None:
    data = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(data[: len(data) // 2])


def test_shards_are_the_whole(folder: pathlib.Path) -> None:
    whole = sit_jax.load(BACKBONES / "hf_dinov2")
    jax.tree.map(np.testing.assert_array_equal, sit_jax.load(folder).variables, whole.variables)


@pytest.mark.parametrize(
    ("damage", "file", "fact"),
    [
        (reshape, "", PATCHES),
        (lambda folder: (folder / SHARDS[1]).unlink(), INDEX, f"the shard {SHARDS[1]} is missing"),
        (cut, SHARDS[1], "not a whole safetensors file"),
        (point(PATCHES, "../x.safetensors"), INDEX, "'../x.safetensors' is not a file of this folder"),
        (point(PATCHES, "/etc/hostname"), INDEX, "'/etc/hostname' is not a file of this folder"),
        (point(PATCHES, ".."), INDEX, "the shard .. is missing"),
        (point("embeddings.more", SHARDS[0]), INDEX, "embeddings.more"),
        (point(PATCHES, SHARDS[0]), INDEX, PATCHES),
        (edit(INDEX, weight_map=[1]), INDEX, "weight_map"),
        (edit(INDEX, weight_map={}), INDEX, "weight_map"),
        (lambda folder: write(folder / INDEX, "{"), INDEX, "not valid JSON"),
        (edit("config.json", model_type="bert"), "config.json", "model_type: 'bert'"),
        (edit("config.json", model_type=["vit"]), "config.json", "model_type"),
        (edit("config.json", hidden_act="relu6"), "config.json", "hidden_act: 'relu6'"),
        (edit("config.json", hidden_act={"a": 1}), "config.json", "hidden_act"),
        (edit("config.json", hidden_act="silu"), "config.json", "hidden_act: 'silu'"),
        (edit("config.json", hidden_size="wide"), "config.json", "hidden_size"),
        (edit("config.json", num_hidden_layers=3), "config.json", "num_hidden_layers: is 3"),
        (edit("config.json", num_hidden_layers=10**9), "config.json", "num_hidden_layers"),
        (edit("config.json", num_attention_heads=0), "config.json", "num_heads"),
        (edit("config.json", layer_norm_eps="small"), "config.json", "layer_norm_eps"),
        (edit("config.json", image_size=3.5), "config.json", "image_size"),
        (edit("config.json", patch_size=[8, 8, 8]), "config.json", "patch_size"),
        (edit("config.json", image_size=64), "", "position"),
        (edit("config.json", id2label=3), "config.json", "id2label"),
        (lambda folder: write(folder / "config.json", "not JSON"), "config.json", "not valid JSON"),
        (lambda folder: write(folder / "config.json", [1, 2]), "config.json", "object"),
        (lambda folder: write(folder / "preprocessor_config.json", "{"), "preprocessor_config.json", "not valid JSON"),
        (
            lambda folder: write(folder / "preprocessor_config.json", {"resample": 99}),
            "preprocessor_config.json",
            "resample",
        ),
    ],
)
def test_damaged_folders(
    damage: Callable[[pathlib.Path], None],
    file: str,
    fact: str,
    folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    assert cli.main(["convert", str(folder), str(folder.parent / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder / file) in line
    assert fact in line
    assert len(line) < 1000
    assert [path.name for path in folder.parent.iterdir()] == ["hub"]


def test_gates_of_other_activations(tmp_path: pathlib.Path) -> None:
    shutil.copytree(BACKBONES / "hf_dinov3_swiglu", tmp_path / "hub")
    edit("config.json", hidden_act="gelu")(tmp_path / "hub")
    with pytest.raises(UserError, match=r"config\.json: hidden_act: 'gelu'"):
        sit_jax.load(tmp_path / "hub")
