"""The commands that need no run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.cli.config_file import load_config
from sit_jax.cli.runtime import enable_compilation_cache
from sit_jax.config.config_dict import from_config_dict, to_dict
from sit_jax.errors import ConfigError, UserError
from sit_jax.models.architecture import Architecture
from sit_jax.models.variants import VARIANTS


def test_models_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(VARIANTS)
    assert {"params", "rtsm_params", "gmac", "tokens"} <= set(rows["sit_tiny"])
    assert (rows["sit_tiny"]["params"], rows["sit_tiny"]["rtsm_params"]) == (15_872_934, 14_015_176)
    assert rows["sit_tiny"]["tokens"] == [196, 98, 49, 24]
    assert rows["lvvit_tiny"]["rtsm_params"] == 0


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model.stem=conv5", "model.stem"),
        ("teacher.model.dtype=int8", "teacher.model.dtype"),
        ("optim.grad_dtype=bfloat16", "optim.grad_dtype"),  # Products are float32.
    ],
)
def test_choices_that_do_not_exist(word: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        load_config("configs/digits.py", [f"--config.{word}"])


@pytest.mark.parametrize(
    ("words", "stages", "ratio"),
    [
        # The file has keep_ratio None, and then 0.5.
        ("configs/imagenet_lvvit_tiny.py model.keep_ratio=0.5 model.stage_blocks=1,1,1,11", (1, 1, 1, 11), 0.5),
        ("configs/digits.py model.keep_ratio=None model.stage_blocks=()", (), None),
    ],
)
def test_a_value_that_may_be_none_can_be_set(words: str, stages: tuple[int, ...], ratio: float | None) -> None:
    page, *overrides = words.split()
    arch = load_config(page, [f"--config.{word}" for word in overrides]).model.architecture
    assert isinstance(arch, Architecture)
    assert (arch.stage_blocks, arch.keep_ratio) == (stages, ratio)


def test_a_section_can_be_removed_but_its_keys_not_be_set_then() -> None:
    plain = [f"--config.{word}" for word in ("teacher=None", "init=random", "loss.token=0", "loss.logits=0")]
    assert load_config("configs/digits.py", plain).teacher is None
    with pytest.raises(ConfigError, match=r"^teacher\.run: "):
        load_config("configs/digits.py", [*plain, "--config.teacher.run=runs/teacher"])
    with pytest.raises(ConfigError, match=r"config\.optim\.lr"):
        load_config("configs/digits.py", ["--config.optim.lr=None"])


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


@pytest.mark.parametrize("words", [["--help"], ["models"], ["convert", "SOURCE", "DEST"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_error(words: list[str], unbuffered: str, tmp_path: pathlib.Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    sit_jax.create_model("deit_tiny", num_classes=3, image_size=32, depth=1).save(source)
    places = {"SOURCE": str(source), "DEST": str(dest)}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sit_jax", *(places.get(word, word) for word in words)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert dest.exists() == ("DEST" in words)


def test_a_full_disk_behind_standard_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sit_jax", "models"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("sit models: standard output ")


def test_python_m_is_the_command() -> None:
    out = subprocess.run([sys.executable, "-m", "sit_jax", "--version"], check=True, capture_output=True, text=True)
    assert out.stdout.startswith("sit_jax 0.")


@pytest.mark.parametrize("path", sorted(pathlib.Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_passes_the_door_and_returns(path: pathlib.Path) -> None:
    config = load_config(str(path))
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    changed = load_config(str(path), ["--config.optim.lr=0.5", "--config.seed=3"])
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


def test_configs_are_found_by_name_from_anywhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = [load_config(f"configs/{name}") for name in ("digits.py", "folder.py:64")]
    monkeypatch.chdir(tmp_path)
    assert [load_config(name) for name in ("digits", "folder:64")] == by_path
    with pytest.raises(ConfigError, match=r"^--config: .*did you mean digits\?$"):
        load_config("digit")


def test_a_config_file_that_returns_something_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.py").write_text("def get_config():\n    return None\n")
    with pytest.raises(ConfigError) as raised:
        load_config(str(tmp_path / "mine.py"))
    assert raised.value.key == "--config"


def test_a_config_file_may_use_the_former_names(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = pathlib.Path("configs/digits.py").read_text()
    assert "sit_jax.config.config_dict" in text
    mine = tmp_path / "mine.py"
    mine.write_text(text.replace("sit_jax.config.config_dict", "sit_jax.config_dict"))
    assert load_config(str(mine)) == load_config("digits")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_compiled_programs_are_kept(tmp_path: pathlib.Path) -> None:
    program = """
import sys, jax
from sit_jax.cli.runtime import enable_compilation_cache
enable_compilation_cache(sys.argv[1])
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
        enable_compilation_cache(str(tmp_path / "file"))


def test_keys_that_had_another_name_work_and_say_the_new_one(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.on_broken=skip", "data.held_out=0.2", "optim.faithful=True", "teacher.optim.faithful=True"]
    config = load_config("digits", [f"--config.{word}" for word in words])
    assert (config.data.on_decode_error, config.data.val_fraction) == ("skip", 0.2)
    assert config.teacher is not None
    assert (config.optim.decay_like_original, config.teacher.optim.decay_like_original) == (True, True)
    keys = [word.partition("=")[0] for word in words]
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == keys
    mine = tmp_path / "mine.py"
    text = pathlib.Path("configs/digits.py").read_text()
    mine.write_text(text.replace("    return config\n", "    config.data.on_broken = 'skip'\n    return config\n"))
    assert load_config(str(mine)).data.on_decode_error == "skip"
    # As a run of an earlier version holds them.
    values = to_dict(load_config("digits"))
    values["data"]["held_out"] = values["data"].pop("val_fraction") + 0.1
    capsys.readouterr()
    assert from_config_dict(values, quiet=True).data.val_fraction == values["data"]["held_out"]
    assert capsys.readouterr().err == ""


def test_a_removed_key_has_no_effect_but_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    expected = load_config("configs/digits.py")
    words = ["--config.model.scan=True", "--config.teacher.model.scan=False"]
    assert load_config("configs/digits.py", words) == expected
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "model.scan",
        "teacher.model.scan",
    ]
    # As a run of an earlier version holds it.
    values = to_dict(expected)
    values["model"] |= {"scan": True}
    values["teacher"]["model"] |= {"scan": False}
    assert from_config_dict(values) == expected
    assert len(capsys.readouterr().err.splitlines()) == 1
