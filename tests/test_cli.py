"""The commands that need no run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from sit_jax import cli
from sit_jax.config_dict import from_config_dict, to_dict
from sit_jax.errors import ConfigError, UserError
from sit_jax.models.variants import VARIANTS
from sit_jax.process import keep_compiled


def test_models_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(VARIANTS)
    assert {"params", "rtsm_params", "gmac", "tokens"} <= set(rows["sit_tiny"])
    assert (rows["sit_tiny"]["params"], rows["sit_tiny"]["rtsm_params"]) == (15_872_934, 14_015_176)
    assert rows["sit_tiny"]["tokens"] == [196, 98, 49, 24]
    assert rows["lvvit_tiny"]["rtsm_params"] == 0


@pytest.mark.parametrize(
    ("word", "key"), [("model.stem=conv5", "model.stem"), ("teacher.model.dtype=int8", "teacher.model.dtype")]
)
def test_choices_that_do_not_exist(word: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        cli.load_config("configs/digits.py", [f"--config.{word}"])


def test_models_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "148,168,398" in out
    assert "…" not in out


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--help"],
        ["train", "--help"],
        ["plan", "--help"],
        ["evaluate", "--help"],
        ["models", "--help"],
        ["export", "--help"],
        ["predict", "--help"],
        ["report", "--help"],
        ["convert", "--help"],
        ["checkpoint", "--help"],
        ["data", "--help"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        assert "usage: sit" in capsys.readouterr().out


def test_unknown_words(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["tran"], ["models", "--jsn"], ["evaluate", "--workdir", "x", "--config.seed=1"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2
        assert "sit" in capsys.readouterr().err


def test_python_m_is_the_command() -> None:
    out = subprocess.run([sys.executable, "-m", "sit_jax", "--version"], check=True, capture_output=True, text=True)
    assert out.stdout.startswith("sit_jax 0.")


@pytest.mark.parametrize("path", sorted(pathlib.Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_passes_the_door_and_returns(path: pathlib.Path) -> None:
    config = cli.load_config(str(path))
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    changed = cli.load_config(str(path), ["--config.optim.lr=0.5", "--config.seed=3"])
    assert (changed.optim.lr, changed.seed) == (0.5, 3)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("configs/folder.py:65", "image_size: 65 does not divide by patch_size 16"),
        ("configs/folder.py:big", "invalid literal for int"),
        ("configs/imagenet_lvvit_tiny.py:scrach", "'scrach' is neither finetune nor scratch"),
        ("configs/imagenet_deit_tiny_sit.py:0.6", "there is no model 'deit_tiny_sit_0.6'"),
        ("configs/digits.py:7", "takes 0 positional arguments"),
    ],
)
def test_arguments_that_a_page_does_not_take(page: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", page, "--workdir", "none"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"sit train: --config: {page}: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error


def test_compiled_programs_are_kept(tmp_path: pathlib.Path) -> None:
    program = """
import sys, jax
from sit_jax.process import keep_compiled
keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(1.0)
"""

    def start(folder: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", program, folder], check=True, env=environment)

    start("")
    assert list((tmp_path / "home" / "sit_jax").iterdir())
    start(str(tmp_path / "mine"))
    assert list((tmp_path / "mine").iterdir())
    before = sorted(tmp_path.rglob("*"))
    start("none")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--compilation_cache: .*file is no folder"):
        keep_compiled(str(tmp_path / "file"))
