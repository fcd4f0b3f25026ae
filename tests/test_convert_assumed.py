"""What `sit convert` says that it assumed of pictures, since the file is silent."""

import json
import pathlib
from typing import Any

import original_models
import pytest
import safetensors.numpy
from test_convert import PLAIN
from test_other_stems import torch_model

from sit_jax.io.convert.convert import convert
from sit_jax.io.convert.options import Options


@pytest.mark.parametrize(
    ("told", "assumed"),
    [
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}, ""),
        (
            {"interpolation": "bilinear", "crop_pct": 0.9},
            "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]",
        ),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, "interpolation bicubic, crop_fraction 0.875"),
        (
            None,
            "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225], interpolation bicubic, crop_fraction 0.875, "
            "resize crop",
        ),
    ],
)
def test_what_timm_does_not_say_of_pictures_is_told(
    told: dict[str, Any] | None, assumed: str, tmp_path: pathlib.Path
) -> None:
    state = {key: value.numpy() for key, value in torch_model(PLAIN).state_dict().items()}
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    config = {} if told is None else {"architecture": "vit_tiny_patch8_32", "pretrained_cfg": told}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert notices(tmp_path, tmp_path.with_suffix(".pth")) == ([assumed] if assumed else [])


def test_google_research_stretches_pictures(tmp_path: pathlib.Path) -> None:
    original_models.save_npz(tmp_path / "ViT.npz", original_models.google(PLAIN))
    assert notices(tmp_path / "ViT.npz", tmp_path / "model") == []
    preprocessing = json.loads((tmp_path / "model" / "config.json").read_text())["preprocessing"]
    # As google-research evaluates: pixels of a whole picture, resized to a square, minus 127.5, over 127.5.
    assert (preprocessing["resize"], preprocessing["interpolation"]) == ("stretch", "bilinear")
    assert preprocessing["mean"] == preprocessing["std"] == [0.5] * 3


def notices(source: pathlib.Path, dest: pathlib.Path) -> list[str]:
    """What `sit convert` says that it assumed."""
    lines: list[str] = []
    convert(source, dest, Options({"num_heads": 2}), force=False, log=lines.append)
    start = "assumed of pictures, as for ImageNet, since the file does not say: "
    return [line.removeprefix(start) for line in lines if line.startswith("assumed")]
