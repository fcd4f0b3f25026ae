"""`sit predict`: pictures in order, the broken ones named, and only a few read ahead."""

import csv
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import malformed
import numpy as np
import pytest
import random_weights
from PIL import Image

from sit_jax.analysis.predict import Prediction, predict
from sit_jax.cli import app as cli
from sit_jax.data.folder import find_images
from sit_jax.errors import ImageDecodeError, UserError
from sit_jax.io.load import load

BROKEN = list(malformed.BROKEN.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("predict") / "model"
    random_weights.draw().save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """200 files, every twentieth of them broken, in folders within folders."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(200):
        folder = root / f"part{index // 80}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{index:04d}.png"
        if index % 20 == 7:
            path.write_bytes(BROKEN[index // 20 % len(BROKEN)])
        else:
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path, compress_level=0)
    return root


def names(root: pathlib.Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*.png"))


def test_pictures_in_order(model: pathlib.Path, pictures: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", str(model), str(pictures), "--format", "jsonl", "--top", "3"]) == 1
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    everything = names(pictures)
    bad = [name for index, name in enumerate(everything) if index % 20 == 7]
    good = [name for index, name in enumerate(everything) if index % 20 != 7]
    assert [answer["picture"] for answer in answers] == good
    told = [line for line in err.splitlines() if line.startswith("predict: skipped ")]
    assert [line.removeprefix("predict: skipped ").split(": ")[0] for line in told] == bad
    assert err.splitlines()[-1] == (
        "sit predict: 10 of 200 images could not be read and were skipped; all others were processed"
    )
    assert all(len(answer["predictions"]) == 3 for answer in answers)


def test_predictions_are_the_models(model: pathlib.Path, pictures: pathlib.Path) -> None:
    some = [name for index, name in enumerate(names(pictures)[:90]) if index % 20 != 7]
    predictor = load(model)
    found = list(predict(predictor, some, top=10, batch_size=8))
    # By hand: the preprocessing that the folder names (crop, bicubic), then the model.
    pixels = []
    for name in some:
        image = Image.open(name).convert("L")
        image = image.resize((43, 36), Image.Resampling.BICUBIC).crop((6, 2, 38, 34))
        pixels.append(np.asarray(image)[:, :, None])
    logits = predictor.logits(np.stack(pixels)).astype(np.float64)
    weights = np.exp(logits)
    expected = weights / weights.sum(axis=1, keepdims=True)
    for answer, row in zip(found, expected, strict=True):
        assert isinstance(answer, Prediction)
        assert answer.classes == list(np.argsort(-row))
        assert answer.names == [f"class {index}" for index in answer.classes]
        np.testing.assert_allclose(answer.probabilities, row[answer.classes], rtol=1e-5)
        assert sum(answer.probabilities) == pytest.approx(1)


def test_files_are_read_only_a_little_ahead(
    model: pathlib.Path, pictures: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def transform(self: Any, example: Any) -> dict[str, Any]:
        read.append(example.name)
        return {"image": np.zeros((32, 32, 1), np.uint8)}

    monkeypatch.setattr("sit_jax.analysis.predict.EvalTransform.__call__", transform)
    answers = predict(load(model), names(pictures), 1, 8)
    next(answers)
    assert 8 <= len(read) <= 8 + 2 * 8 + 1
    answers.close()  # type: ignore[attr-defined]
    assert len(read) < 50


def test_all_broken(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = [str(tmp_path / "gone.png"), str(tmp_path), "nul\0l"] * 3
    answers = list(predict(load(model), files, 1, 2))
    assert all(isinstance(answer, ImageDecodeError) for answer in answers)
    assert [str(answer).split(": ")[0] for answer in answers] == files


def test_formats(model: pathlib.Path, pictures: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = names(pictures)[:3]
    words = ["predict", str(model), *some, "--top", "2", "--format"]
    assert cli.main([*words, "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert cli.main([*words, "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    flat = [(row["picture"], rank, x) for row in rows for rank, x in enumerate(row["predictions"], start=1)]
    assert len(table) == len(flat) == 6
    for line, (picture, rank, x) in zip(table, flat, strict=True):
        told = [picture, str(rank), str(x["class"]), x["name"], f"{x['probability']:.6f}"]
        assert list(line.values()) == told
    assert cli.main([*words, "table"]) == 0
    for text, row in zip(capsys.readouterr().out.splitlines(), rows, strict=True):
        first = row["predictions"][0]
        assert text.startswith(f"{row['picture']}   {first['name']}")


def test_which_pictures(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.jpg", "deep/c.webp", "deep/.hidden.png", "deep/notes.txt", "odd[1].png", "empty/x.txt"):
        pathlib.Path(name).parent.mkdir(exist_ok=True)
        pathlib.Path(name).write_bytes(b"")
    assert find_images(["b.png", "a.jpg"]) == ["b.png", "a.jpg"]
    assert find_images(["deep"]) == ["deep/c.webp"]
    assert find_images(["*.png"]) == ["b.png", "odd[1].png"]
    assert find_images(["**/*.webp"]) == ["deep/c.webp"]
    assert find_images(["odd[1].png"]) == ["odd[1].png"]
    assert find_images(["-", "a.jpg"], ["x y.png\n", "\n", "z.png\r\n"]) == ["x y.png", "z.png", "a.jpg"]
    for word, message in {"gone.png": "no such file", "*.gif": "no such file", "empty": "contains no images"}.items():
        with pytest.raises(UserError, match=message):
            find_images([word])


def test_a_list_on_standard_input_and_a_reader_that_leaves(model: pathlib.Path, pictures: pathlib.Path) -> None:
    some = names(pictures)
    command = [sys.executable, "-m", "sit_jax", "predict", str(model), "-", "--format", "jsonl", "--batch_size", "8"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process: Any = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdin.write("\n".join(some).encode())
    process.stdin.close()
    assert json.loads(process.stdout.readline())["picture"] == some[0]
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in errors
    assert "Broken pipe" not in errors


def test_mistakes(model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([tmp_path / "none", model / "config.json"], "none: there is no such file or folder"),
        ([tmp_path, model / "config.json"], "is neither a run nor a model folder"),
        ([model, tmp_path / "x.png"], "x.png: there is no such file, folder or match"),
    ):
        assert cli.main(["predict", *map(str, words)]) == 2, words
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
