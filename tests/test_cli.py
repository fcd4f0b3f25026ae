"""The command line and its config files, without a run."""

import dataclasses
import json
import operator
import os
import pathlib
import subprocess
import sys

import pytest
import tiny

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.cli.config_file import load_config, split_overrides
from sit_jax.cli.runtime import enable_compilation_cache
from sit_jax.config import DataConfig, LossConfig
from sit_jax.config.config_dict import from_config_dict, to_dict
from sit_jax.data.tfds_source import tfds_folder
from sit_jax.errors import ConfigError, RunError
from sit_jax.models.architecture import Architecture
from sit_jax.models.variants import VARIANTS

DIGITS = pathlib.Path("configs/digits.py").read_text()


def test_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(VARIANTS)
    tiny = rows["sit_tiny"]
    assert (tiny["params"], tiny["rtsm_params"], tiny["tokens"]) == (15_872_934, 14_015_176, [196, 98, 49, 24])
    assert rows["lvvit_tiny"]["rtsm_params"] == 0
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models"]) == 0
    table = capsys.readouterr().out
    assert "148,168,398" in table
    assert "…" not in table


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in cli.VERBS), ("data", "prepare"), ("checkpoint", "show")])
def test_help(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {' '.join(['sit', *verb])} ")
    assert "(default: None)" not in text
    assert ("(default: 7860)" in text) == (verb == ("demo",))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("tran", "tran"),
        ("models --jso", "--jso"),  # No abbreviations.
        ("evaluate --workdir x --config.seed=1", "--config.seed=1"),  # A verb without --config.
        ("predict m x.png --top 0", "--top: must be at least 1, got 0"),
        ("visualize m x.png --tokens 33", "--tokens: must be from 1 to 32, got 33; --arrays"),
        ("data prepare --val_fraction 1", "--val_fraction: must be above 0 and below 1, got 1"),
        ("benchmark m --seconds long", "--seconds: must be a number, got 'long'"),
        ("train --config digits --workdir gs://b/run", "gs://b/run"),
        ("train --config digits --workdir=", "--workdir: is empty"),
        ("train --config digits --config.model.stage_blocks 1 2", "arguments: 2"),
    ],
)
def test_wrong_arguments(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_not_an_error(unbuffered: str, tmp_path: pathlib.Path) -> None:
    shape = {"num_classes": 3, "image_size": 32, "dim": 24, "num_heads": 2, "depth": 1}
    sit_jax.create_model("deit_tiny", **shape).save(tmp_path / "source")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sit_jax", "convert", "source", "dest"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "dest").exists()


def test_a_closed_standard_error_stays_out_of_standard_output() -> None:
    for words in (["models", "--json"], ["report", "none"]):
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "sit_jax", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        assert (done.returncode, done.stdout[:1]) == ((0, "[") if words[0] == "models" else (2, ""))


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        ("banana", "benchmark deit_tiny"),
        ("rocm", "data show --output none.png --config digits --config.data.name synthetic/10"),  # Fails within a jit.
        ("cuda", "train --workdir none --config digits --config.data.name synthetic/10"),
        ("cuda", "benchmark deit_tiny"),
    ],
)
def test_a_platform_that_is_not_here_is_one_line(platform: str, words: str) -> None:
    if platform == "cuda" and pathlib.Path("/dev/nvidiactl").exists():
        pytest.skip("the platform may be here")
    command = [sys.executable, "-m", "sit_jax", *words.split()]
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert f"JAX_PLATFORMS={platform}" in line


def test_a_full_disk_behind_standard_output_is_an_error() -> None:
    command = [sys.executable, "-m", "sit_jax", "models"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("sit models: standard output ")


def test_compiled_programs_are_kept(tmp_path: pathlib.Path) -> None:
    program = """
import sys, jax
from sit_jax.cli.runtime import enable_compilation_cache
enable_compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(1.0)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    for folder, used in (("", "home/sit_jax"), (str(tmp_path / "mine"), "mine"), ("none", None)):
        before = sorted(tmp_path.rglob("*"))
        subprocess.run([sys.executable, "-c", program, folder], check=True, env=environment)
        assert list((tmp_path / used).iterdir()) if used else sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as raised:
        enable_compilation_cache(str(tmp_path / "file"))
    assert raised.value.key == "--compilation_cache"


@pytest.mark.parametrize("path", sorted(pathlib.Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_survives_json(path: pathlib.Path) -> None:
    page = f"{path}:tests/golden/backbones/hf_dinov2" if path.stem == "features" else str(path)
    config = load_config(page)
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    changed = load_config(page, ["--config.optim.lr=0.5", "--config.seed=3"])
    assert (changed.optim.lr, changed.seed) == (0.5, 3)


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("--config.optim.lr 1e-3", ["--config.optim.lr=1e-3"]),
        ("-config.optim.lr=1e-3 -config.seed 1", ["--config.optim.lr=1e-3", "--config.seed=1"]),
        ("--config.seed -1 --config.optim.lr -.5", ["--config.seed=-1", "--config.optim.lr=-.5"]),
        ("--config.model.remat --resume", ["--config.model.remat"]),
        ("--noconfig.model.remat true", ["--noconfig.model.remat"]),
        ("--config.data.train_split=a=b --config.seed", ["--config.data.train_split=a=b", "--config.seed"]),
    ],
)
def test_overrides_in_the_forms_of_absl(words: str, overrides: list[str]) -> None:
    before = ["train", "--config=digits", "-config", "folder"]
    found, others = split_overrides([*before, *words.split(), "--", "--config.x"])
    assert found == overrides
    left = [word for word in words.split() if word in ("--resume", "true")]
    assert others == ["train", "--config=digits", "--config", "folder", *left, "--", "--config.x"]


def test_values_with_spaces_and_booleans_without_values() -> None:
    words = [
        "--config.model.stage_blocks",
        "(1, 2, 3, 8)",
        "--config.data.data_dir",
        "my data",
        "--noconfig.model.remat",
    ]
    config = load_config("digits", split_overrides(words)[0])
    assert isinstance(config.model.architecture, Architecture)
    assert config.model.architecture.stage_blocks == (1, 2, 3, 8)
    assert (config.data.data_dir, config.model.remat) == ("my data", False)
    assert load_config("digits", ["--noconfig.model.remat", "--config.model.remat"]).model.remat


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("--config.optim.lr", "optim.lr"),
        ("--noconfig.optim.lr", "optim.lr"),
        ("--noconfig.model.remat=1", "model.remat"),
        ("--config.teacher.optim.lr", "teacher.optim.lr"),
        ("--config.epochs=1e3", "epochs"),
        ("--config.epochs=1.0", "epochs"),
        ("--config.data.data_dir", "data.data_dir"),
        ("--config.model.image_size=64,64,3", "model.image_size"),
        ("--config.model.remat=yes", "model.remat"),
        ("--config.data.mean=0.5 0.5 0.5", "data.mean"),
        ("--config.optim=1", "optim"),
        ("--config.=1", "--config."),
    ],
)
def test_overrides_that_name_their_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("digits", [override])
    assert raised.value.key == key
    assert "flag" not in raised.value.problem


@pytest.mark.parametrize(
    "words",
    [
        "evaluate ~/x",
        "evaluate --workdir=~/x",
        "predict ~/x ~/x.png",
        "train --config=~/x.py",
        "export ~/x y --format folder",
        "convert ~/x y",
        "benchmark ~/x",
        "report --no_model ~/x",
        "compare --config=~/x.py --workdir=none",
        "checkpoint list --workdir=~/x",
        "data prepare --name x --from_folder=~/x",
        "data check --config digits --config.data.name folder --config.data.data_dir=~/x",
    ],
)
def test_home_folders_are_expanded(
    words: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(words.split()) == 2
    assert str(tmp_path / "x") in capsys.readouterr().err


def test_home_folders_in_configs_and_python(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", "~/x")
    keys = ("data.data_dir", "data.label_maps", "teacher.run", "teacher.init", "init")
    config = load_config("digits", [f"--config.{key}=~/x" for key in keys])
    for key in keys:
        assert operator.attrgetter(key)(config) == str(tmp_path / "x")
    assert DataConfig(data_dir="~nobody_has_this_name/x").data_dir == "~nobody_has_this_name/x"
    assert tfds_folder("") == tmp_path / "x"
    (tmp_path / "x.py").write_text(DIGITS)
    assert sit_jax.get_config("~/x.py") == sit_jax.get_config("digits")
    sit_jax.create_model("deit_tiny", num_classes=3, image_size=32, dim=24, num_heads=2, depth=1).save("~/model")
    assert sit_jax.load("~/model").source == str(tmp_path / "model")
    with pytest.raises(RunError, match=str(tmp_path / "x.py")):
        sit_jax.train(tiny.config(LossConfig(), teacher=None, data=DataConfig(name="synthetic/10")), "~/x.py")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("model.stem=conv5", "model.stem"),
        ("teacher.model.dtype=int8", "teacher.model.dtype"),
        ("optim.grad_dtype=bfloat16", "optim.grad_dtype"),  # Products are float32.
        ("data.mean[0]=0.5", "data.mean[0]"),
        ("optim.lr=None", "optim.lr"),
        ("init=", "init"),
        ("teacher.init=None", "teacher.init"),
        ("teacher=None init=random loss.token=0 loss.logits=0 teacher.run=runs/teacher", "teacher.run"),
    ],
)
def test_values_that_are_not_allowed(words: str, key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("digits", [f"--config.{word}" for word in words.split()])
    assert key in str(raised.value).partition(": ")[0]


def test_initial_weights_that_are_none() -> None:
    config = sit_jax.get_config("digits")
    with config.ignore_type():
        config.init = None
    with pytest.raises(ConfigError, match=r"^init: .*random"):
        from_config_dict(config)


def test_a_value_that_may_be_none_can_be_set() -> None:
    words = "model.keep_ratio=None model.stage_blocks=() teacher=None init=random loss.token=0 loss.logits=0"
    config = load_config("digits", [f"--config.{word}" for word in words.split()])
    assert isinstance(config.model.architecture, Architecture)
    assert (config.model.architecture.stage_blocks, config.model.architecture.keep_ratio) == ((), None)
    assert config.teacher is None
    # None in the file.
    changed = load_config("imagenet_lvvit_tiny", ["--config.model.keep_ratio=0.5", "--config.model.stage_blocks=1,13"])
    assert changed.model.architecture == dataclasses.replace(
        VARIANTS["lvvit_tiny"], keep_ratio=0.5, stage_blocks=(1, 13)
    )


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("configs/folder.py:65", "patch_size 16"),
        ("configs/imagenet_lvvit_tiny.py:scrach", "'scrach'"),
        ("configs/digits.py:7", "0 positional arguments"),
        ("digit", "digits"),  # What may be meant.
    ],
)
def test_configs_that_cannot_be_loaded(name: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", name, "--workdir", "none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sit train: --config: ")
    assert name in line
    assert named in line


def test_configs_are_found_by_name_from_anywhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = [load_config(f"configs/{name}") for name in ("digits.py", "folder.py:64")]
    monkeypatch.chdir(tmp_path)
    assert [load_config(name) for name in ("digits", "folder:64")] == by_path


def test_config_files_of_users(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def get_config():\n    return None\n")
    with pytest.raises(ConfigError) as raised:
        load_config(str(mine))
    assert raised.value.key == "--config"
    # Former names of a module and of a key.
    mine.write_text(DIGITS.replace("sit_jax.config.config_dict", "sit_jax.config_dict"))
    assert load_config(str(mine)) == load_config("digits")
    assert len(capsys.readouterr().err.splitlines()) == 1
    mine.write_text(DIGITS.replace("    return config\n", "    config.data.on_broken = 'skip'\n    return config\n"))
    assert load_config(str(mine)).data.on_decode_error == "skip"


def test_keys_that_had_another_name_or_were_removed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.on_broken=skip", "data.held_out=0.2", "optim.faithful=True", "teacher.optim.faithful=True"]
    words += ["model.scan=True", "teacher.model.scan=False"]
    config = load_config("digits", [f"--config.{word}" for word in words])
    assert (config.data.on_decode_error, config.data.val_fraction) == ("skip", 0.2)
    assert config.teacher is not None
    assert (config.optim.decay_like_original, config.teacher.optim.decay_like_original) == (True, True)
    lines = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(lines) == sorted(word.partition("=")[0] for word in words)
