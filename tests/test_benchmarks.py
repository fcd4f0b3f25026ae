"""The benchmark scripts run, in a tiny form."""

import json
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_loader(tmp_path: pathlib.Path) -> None:
    figures = tmp_path / "figures.json"
    words = ["--images", "64", "--pictures", "80", "--rounds", "1", "--workers", "1", "--json", str(figures)]
    done = subprocess.run([sys.executable, "benchmarks/loader.py", *words], capture_output=True, text=True, check=True)
    assert "| full | sit_jax |" in done.stdout
    rows = {(row["recipe"], row["loader"]): row for row in json.loads(figures.read_text())["results"]}
    assert {(recipe, "sit_jax") for recipe in ("plain", "full")} <= set(rows)
    assert all(row["images_per_s"] > 0 and row["start_up_s"] < 60 for row in rows.values())
    assert "timm is left out" in done.stderr or ("full", "timm") in rows
