"""What users install: the wheel and the sdist."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

CONFIGS = {path.name for path in pathlib.Path("configs").glob("*.py")}
TEMPLATES = {path.name for path in pathlib.Path("sit_jax/report/templates").iterdir()}


@pytest.mark.slow
def test_wheel_and_sdist_hold_configs_templates_and_licence(tmp_path: pathlib.Path) -> None:
    source, empty = tmp_path / "source", tmp_path / "empty"
    for name in ("sit_jax", "configs"):
        shutil.copytree(name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(name, source)
    build = "import setuptools.build_meta as b; print(b.build_sdist('dist'), b.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=source, capture_output=True)
    (wheel,), (sdist,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"sit_jax/configs/{name}" for name in CONFIGS} <= held
    assert {f"sit_jax/report/templates/{name}" for name in TEMPLATES} <= held
    assert "sit_jax/py.typed" in held
    assert any(name.endswith("/LICENSE") for name in held)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"configs/{name}" for name in CONFIGS} | {"LICENSE", "setup.py", "sit_jax/py.typed"} <= names
    # As installed, where there is no checkout.
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    empty.mkdir()
    program = "from sit_jax.cli.config_file import load_config as load; print(load('digits').epochs, load('folder:64'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=empty, env=environment)
