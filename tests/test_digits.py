"""The demo as the README promises it: a real training, minutes long."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_digits_demo(tmp_path: pathlib.Path, digits_dir: str) -> None:
    folder = tmp_path / "digits"
    words = ["--config", "configs/digits.py", "--workdir", str(folder), f"--config.data.data_dir={digits_dir}"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-m", "sit_jax", "train", *words], check=True, env=environment)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["teacher"]["top1"] >= 0.975
    assert summary["kept_accuracy"] >= 0.97
    assert summary["gmac_ratio"] >= 3.0
    assert summary["student"]["params"] < 1.02 * summary["teacher"]["params"]
    for name in ("curves.png", "slimming.png"):
        assert (folder / name).stat().st_size > 10_000
