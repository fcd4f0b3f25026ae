"""From a folder of JPEGs to a slimmed model, with the commands that a user types."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import images
import malformed
import numpy as np
import pytest
from PIL import Image

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.data.config import DataConfig
from sit_jax.data.folder import FolderSource
from sit_jax.data.label_maps import LabelMaps
from sit_jax.errors import PartialFailureError
from sit_jax.io.runs import read_config
from sit_jax.training.dense_labels import write_label_maps
from sit_jax.training.metrics import read_metrics

SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 16, "optim.warmup_epochs": 0.0}
TINY: dict[str, Any] = {"stem": "patch", "dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "image_size": 32}


def words(folder: pathlib.Path, **more: Any) -> list[str]:
    models = ("model",) if "teacher" in more else ("model", "teacher.model")
    values = {f"{model}.{key}": value for model in models for key, value in TINY.items()}
    values |= {"data.data_dir": folder, "model.stage_blocks": (1, 1), **more}
    return ["--config", "configs/folder.py:64", *(f"--config.{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Eight classes of four training and two held-out images, and a split that is not used."""
    root = tmp_path_factory.mktemp("photos")
    (root / "Testing" / "astronaut").mkdir(parents=True)
    images.make_folder(root, 4, "train", size=(36, 32))
    images.make_folder(root, 2, "val", seed=1, size=(36, 32))
    return root


@pytest.fixture(scope="module")
def finished(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A teacher and its student, trained on the folder for an epoch each."""
    run = tmp_path_factory.mktemp("runs") / "photos"
    short = SHORT | {f"teacher.{key}": value for key, value in SHORT.items()} | {"log.every_steps": 1}
    short["eval_batch_size"] = 12  # Rounded up to 16 on eight devices, here and in `sit evaluate`.
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.main(["train", *words(folder, **short), "--workdir", str(run)]) == 0
    assert said.getvalue().count("Testing") == 1  # Not again for the teacher.
    return run


def test_run_takes_the_classes_from_the_folder_and_scales_its_rate(finished: pathlib.Path) -> None:
    assert read_config(finished).model.architecture.num_classes == 8
    # 1e-3 is for batches of 64; a quarter of the batch, a quarter of the rate.
    assert read_config(finished / "teacher").scaled_optim.lr == pytest.approx(2.5e-4)
    rates = [line["lr/model"] for line in read_metrics(finished / "teacher") if line["kind"] == "train"]
    assert max(rates) == pytest.approx(2.5e-4)


def test_evaluation_on_the_runs_data_and_on_other_data(
    finished: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    evaluate = ["evaluate", "--workdir", str(finished), "--json"]
    images.make_folder(tmp_path, 5, "val", seed=2, size=(36, 32))
    (tmp_path / "train").symlink_to(tmp_path / "val")
    results = []
    for args, examples in (([], 16), (["--split", "train"], 32), (["--data_dir", str(tmp_path)], 40)):
        assert cli.main([*evaluate, *args]) == 0
        results.append(json.loads(capsys.readouterr().out))
        assert results[-1]["examples"] == examples
    # `val` alone, and `train` alone, of which a part is held out whichever split is evaluated.
    for name, args, examples in (("val", [], 40), ("Train", [], 8), ("Train", ["--split", "train"], 32)):
        lone = tmp_path / f"only_{name}"
        lone.mkdir(exist_ok=True)
        if not (lone / name).exists():
            (lone / name).symlink_to(tmp_path / "val")
        assert cli.main([*evaluate, "--data_dir", str(lone), *args]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["examples"] == examples
        assert str(lone) in printed.err
    summary = json.loads((finished / "summary.json").read_text())
    assert results[0]["top1"] == pytest.approx(summary["student"]["top1"])
    for mistake in (["--split", "tset"], ["--data_dir", str(tmp_path / "none")], ["--name", "none"]):
        assert cli.main([*evaluate, *mistake]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert cli.main([*evaluate, "--name", "digits", "--split", "test"]) == 2
    assert "model.num_classes" in capsys.readouterr().err


def test_token_labelling(finished: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    # A teacher with an auxiliary head, started from the finished one, labels the images; the next learns from that.
    maps, first, second = (str(tmp_path / name) for name in ("maps", "first", "second"))
    assert cli.main(["data", "label", "--workdir", str(finished), "--output", maps]) == 2
    assert "--workdir" in capsys.readouterr().err
    plain: dict[str, Any] = {"model.aux_head": True, "model.stage_blocks": "()", "model.keep_ratio": None}
    plain |= {"teacher": None, "loss.token": 0.0, "loss.logits": 0.0, "init": finished / "teacher"}
    train = ["train", *words(folder, **plain, **SHORT)]
    assert cli.main([*train, "--workdir", first]) == 0
    assert cli.main(["data", "label", "--workdir", first, "--output", maps, "--top", "3"]) == 0
    stored = LabelMaps(pathlib.Path(maps))
    assert len(stored) == 32
    classes, values = stored[7]
    assert classes.shape == values.shape == (2, 2, 3)
    assert (np.diff(values, axis=-1) <= 0).all()
    assert values.sum(axis=-1).max() <= 1.001
    assert cli.main(["data", "label", "--workdir", first, "--output", maps]) == 2
    assert "holds label maps already" in capsys.readouterr().err
    dense = [f"--config.data.label_maps={maps}", "--config.loss.token_label=0.5"]
    mixed = ["--config.mix.mix_token=1.0", "--config.mix.mixup=0.0", "--config.mix.cutmix=0.0"]
    assert cli.main([*train, "--workdir", second, *dense, *mixed, "--config.log.every_steps=1"]) == 0
    lines = [line for line in read_metrics(pathlib.Path(second)) if line["kind"] == "train"]
    assert all(np.isfinite(line["token_label"]) for line in lines)
    # Both start with the same random dense head, which token labelling alone trains.
    before, after = (sit_jax.load(run).params["aux_head"]["kernel"] for run in (first, second))
    assert not np.array_equal(before, after)
    for wrong, key in (
        (["--config.loss.token_label=0.5"], "data.label_maps"),
        ([*dense, "--config.model.aux_head=False"], "loss.token_label"),
        ([*dense, "--config.mix.mix_token=1.0"], "mix.mix_token"),
        (["--config.data.label_maps=" + first, "--config.loss.token_label=0.5"], "data.label_maps"),
        ([*dense, "--config.data.train_split=val"], "data.label_maps"),
    ):
        assert cli.main([*train, "--workdir", str(tmp_path / "third"), *wrong]) == 2
        assert key in capsys.readouterr().err
        assert not (tmp_path / "third").exists()
    # An image that cannot be read has no labels, and is not counted as one that has.
    hurt = tmp_path / "hurt"
    images.make_folder(hurt, 2, "train", size=(36, 32))
    (hurt / "train" / "chelsea" / "0000.jpg").write_bytes(b"")
    data = DataConfig(name="folder", data_dir=str(hurt), eval_split="train")
    with pytest.raises(PartialFailureError, match=r"^1 of 16 "):
        write_label_maps(pathlib.Path(first), tmp_path / "some", 3, data)
    stored = LabelMaps(tmp_path / "some")
    files = FolderSource(hurt, "train", used=["train"]).files
    labelled = [bool(stored[index][1].any()) for index in range(16)]
    assert labelled == [not path.endswith("chelsea/0000.jpg") for path, _ in files]


def test_check_tells_what_is_odd_and_what_is_broken(folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    check = ["data", "check", *words(folder)]
    assert cli.main(check) == 0
    out = capsys.readouterr().out
    assert "train: 32 images, 8 classes, 4 to 4 per class" in out
    assert "none broken" in out
    zoo = tmp_path / "train"
    for index, files in enumerate((malformed.BROKEN, {name: data for name, (data, _) in malformed.ODD.items()})):
        (zoo / f"class{index}").mkdir(parents=True)
        for name, data in files.items():
            (zoo / f"class{index}" / name).write_bytes(data)
    (zoo / "class0" / "notes.txt").write_text("hello")
    (zoo / "empty").mkdir()
    check += [f"--config.data.data_dir={tmp_path}", "--config.data.eval_split=train"]
    check += ["--config.data.max_pixels=1000000"]
    assert cli.main([*check, "--all"]) == 2
    printed = capsys.readouterr()
    assert f"{len(malformed.BROKEN)} images cannot be read" in printed.err
    assert all(name in printed.out for name in malformed.BROKEN)
    for fact in ("data.on_decode_error=error", "CMYK", "16-bit", "animated", "EXIF", "notes.txt", "1 classes without"):
        assert fact in printed.out
    assert cli.main([*check, "--json"]) == 2
    (report,) = json.loads(capsys.readouterr().out)
    assert report["pictures"] == len(malformed.BROKEN) + len(malformed.ODD)
    assert len(report["broken"]) == len(malformed.BROKEN)
    assert report["per_class"]["empty"] == 0


def test_check_needs_no_valid_model(folder: pathlib.Path, capsys: Any) -> None:
    data = ["--config.name.is.wrong=1"], [f"--config.data.data_dir={folder}", "--config.model.depth=0"]
    for args, code in zip(data, (2, 0), strict=True):
        assert cli.main(["data", "check", "--config", "folder:16", *args]) == code
    assert "Testing" in capsys.readouterr().err
    assert cli.main(["data", "check", "--config", "folder:32", "--config.data.resize=x"]) == 2
    assert capsys.readouterr().err.startswith("sit data check: data.resize: ")


def test_show_draws_what_the_model_sees(folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    path = tmp_path / "deep" / "grid.png"
    assert cli.main(["data", "show", *words(folder, batch_size=16), "--output", str(path), "--count", "12"]) == 0
    assert "12 images" in capsys.readouterr().out
    with Image.open(path) as image:
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
    assert cli.main(["data", "show", *words(folder, batch_size=16), "--output", "/proc/none/grid.png"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_figures_with_the_backend_of_a_notebook_and_odd_class_names(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for split in ("train", "val"):
        for old, new in (("coffee", b"caf\xe9"), ("rocket", b"US$$")):
            shutil.copytree(folder / split / old, tmp_path / split / os.fsdecode(new))
    path = tmp_path / "grid.png"
    command = [sys.executable, "-m", "sit_jax", "data", "show", *words(tmp_path, batch_size=8), "--output", str(path)]
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_not_here"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.is_file()
