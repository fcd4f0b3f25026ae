"""The paper's five models at full size: JAX, PyTorch, ONNX and StableHLO give the same logits."""

import pathlib
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import random_weights
import torch

from sit_jax.cli import app as cli
from sit_jax.io.export import torch_model
from sit_jax.models.variants import VARIANTS

PAPER = tuple(name for name in VARIANTS if name.startswith("sit_"))
# JAX and StableHLO in processes of their own, since the large model's weights would otherwise lie here many times.
PROGRAM = """
import pathlib, sys
import numpy as np
import sit_jax
from sit_jax.io.export.stablehlo import load
folder = pathlib.Path(sys.argv[1])
run = sit_jax.load(folder / "model") if sys.argv[2] == "jax" else load(folder / "model.stablehlo").run
np.save(folder / f"{sys.argv[2]}.npy", np.asarray(run(np.load(folder / "images.npy"))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_logits_agree(name: str, tmp_path: pathlib.Path) -> None:
    arch = VARIANTS[name]
    random_weights.draw(arch).save(tmp_path / "model")
    images = random_weights.images(arch, 2)
    np.save(tmp_path / "images.npy", images)
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    results = {}
    for kind in ("onnx", "stablehlo"):
        assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / f"model.{kind}"), "--format", kind]) == 0
    for way in ("jax", "stablehlo"):
        subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), way], check=True)
        results[way] = np.load(tmp_path / f"{way}.npy")
    with torch.inference_mode():
        results["torch"] = torch_model.load(tmp_path / "model")(torch.from_numpy(nchw)).numpy()
    (results["onnx"],) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"images": nchw})
    spread = results["jax"].std()
    assert spread > 0.1
    for way, logits in results.items():
        error = np.abs(logits - results["jax"]).max()
        print(f"{name} {way}: largest difference {error:.2e}, logits' deviation {spread:.2f}")
        assert error <= 1e-4, way
