"""`sit visualize`: figures and arrays of real images, of a split, of models with and without slimming."""

import os
import pathlib
import re
from typing import Any

import images
import numpy as np
import pytest
import random_weights
import tiny
from PIL import Image

from sit_jax.cli import app as cli
from sit_jax.data.config import DataConfig
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Example
from sit_jax.io.load import load
from sit_jax.visual import token_maps as core
from sit_jax.visual.figure import draw_maps, draw_slimming
from sit_jax.visual.model_input import preprocess
from sit_jax.visual.visualize import arrays_of

COLOUR = tiny.plain(
    image_size=64, in_channels=3, stem="patch", patch_size=8, stage_blocks=(1, 1, 2), kept_tokens=(64, 12, 5)
)
WIDTH = 10.4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("visualize") / "model"
    random_weights.draw(COLOUR).save(path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two real JPEGs, one of them twice under the same name, and a broken one."""
    root = tmp_path_factory.mktemp("photographs")
    found = images.photographs()
    (root / "deep").mkdir()
    (root / "china.jpg").write_bytes(images.jpeg(found["china"]))
    (root / "deep" / "china.jpg").write_bytes(images.jpeg(found["chelsea"][:, :300]))
    (root / "cut.jpg").write_bytes(images.jpeg(found["flower"])[:2000])
    (root / "flower.jpg").write_bytes(images.jpeg(found["flower"]))
    return root


def test_photographs(
    model: pathlib.Path, photographs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, arrays = tmp_path / "figures", tmp_path / "arrays"
    words = [str(model), str(photographs), "--output", str(out), "--arrays", str(arrays), "--dpi", "50"]
    forward: Any = core._forward
    compiled = forward._cache_size()
    assert cli.main(["visualize", *words, "--tokens", "6", "--batch_size", "2"]) == 1
    assert forward._cache_size() == compiled + 1  # Two batches, the last one filled up.
    said, errors = capsys.readouterr()
    assert f"Written: {out} (3 images)" in said
    assert f"visualize: skipped {photographs / 'cut.jpg'}: " in errors
    assert errors.splitlines()[-1].startswith("sit visualize: 1 of 4 images ")
    # Both of one name are there, and nothing else is: no half of a file, nothing of the broken one.
    assert sorted(x.name for x in out.iterdir()) == ["china-2.maps.png", "china.maps.png", "flower.maps.png"]
    assert sorted(x.name for x in arrays.iterdir()) == ["china-2.npz", "china.npz", "flower.npz"]
    for path in out.iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.width == round(WIDTH * 50)
            assert np.asarray(image).std() > 20
    for name, source in (("china", "china.jpg"), ("china-2", "deep/china.jpg"), ("flower", "flower.jpg")):
        check_arrays(model, arrays / f"{name}.npz", photographs / source)


def check_arrays(model: pathlib.Path, path: pathlib.Path, source: pathlib.Path) -> None:
    """An .npz file against the predictor's logits, and the maps against loops."""
    with np.load(path) as file:
        found = {key: file[key] for key in file.files}
    assert list(found["pictures"]) == [str(source)]
    assert list(found["class_names"]) == [f"class {index}" for index in range(10)]
    np.testing.assert_array_equal(found["pixels"][0], images.center_crop(source.read_bytes(), 64))
    logits = load(model).logits(found["pixels"])
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    assert found["probabilities"].sum() == pytest.approx(1)
    first, second = found["assignment_1"][0], found["assignment_2"][0]
    assert (first.shape, second.shape) == ((64, 12), (12, 5))
    # The float32 columns sum to one only nearly; the rows of a map exactly.
    np.testing.assert_allclose(found["cumulative_1"][0], (first / first.sum(axis=0, dtype=np.float64)).T, rtol=1e-7)
    np.testing.assert_allclose(found["cumulative_2"][0], (first @ second).T, atol=1e-6)
    np.testing.assert_array_equal(found["hard_2"], found["cumulative_2"].argmax(axis=1))
    np.testing.assert_array_equal(found["overlooked_2"], found["cumulative_2"].max(axis=1) < 0.5 / 64)
    assert found["effective_patches_1"].shape == (1, 12)
    assert list(found["token_counts"][0]) == [64, 12, 5, 5]
    assert found["class_attention"].shape == (1, 4, 64)
    over = found["token_attention_2"][0] @ found["cumulative_2"][0]
    np.testing.assert_allclose(over, found["class_attention"][0, 2:].mean(axis=0), atol=1e-6)


def test_what_is_shown_is_what_the_model_sees(model: pathlib.Path, photographs: pathlib.Path) -> None:
    subject = load(model)
    for name in ("china.jpg", "deep/china.jpg"):
        seen = preprocess(subject.vit, subject.data, Example((photographs / name).read_bytes(), -1, name))
        np.testing.assert_array_equal(seen.pixels, images.center_crop((photographs / name).read_bytes(), 64))
        assert seen.shown.shape == (384, 384, 3)
        small = np.asarray(Image.fromarray(seen.shown).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        # The same part of the image: a shift by one of the model's pixels would be more than this.
        off = np.abs(small - seen.pixels).mean()
        assert off < 0.4 * np.abs(np.roll(seen.pixels.astype(int), 1, axis=1) - seen.pixels).mean()


def test_a_model_without_slimming(
    photographs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_weights.draw(COLOUR.without_slimming()).save(tmp_path / "model")
    # A name of signs that figures must not take for a formula, and of a script that the font lacks.
    odd = tmp_path / "a $\\frac$ 塔.jpg"
    odd.write_bytes((photographs / "china.jpg").read_bytes())
    words = [str(tmp_path / "model"), str(odd), "--output", str(tmp_path / "out"), "--arrays", str(tmp_path / "x.npz")]
    assert cli.main(["visualize", *words, "--dpi", "30"]) == 0
    assert capsys.readouterr().err.splitlines()[0].startswith(f"{tmp_path / 'model'}: has no token slimming")
    assert (tmp_path / "out" / "a $\\frac$ 塔.maps.png").is_file()
    with np.load(tmp_path / "x.npz") as found:
        assert "cumulative_1" not in found.files
        assert found["class_attention"].shape == (1, 4, 64)


@pytest.mark.parametrize(("size", "class_token"), [((32, 48), True), ((48, 32), False)])
def test_a_backbone_without_a_head_of_another_form(
    size: tuple[int, int], class_token: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = {} if class_token else {"class_token": False, "pool": "avg"}
    arch = tiny.plain(image_size=size, num_classes=0, in_channels=3, stem="patch", patch_size=8, depth=2, **pool)
    random_weights.draw(arch).save(tmp_path / "model")
    Image.new("RGB", (48, 48), (0, 255, 0)).save(tmp_path / "green.png")
    words = [str(tmp_path / "model"), str(tmp_path / "green.png"), "--arrays", str(tmp_path / "x.npz")]
    assert cli.main(["visualize", *words, "--output", str(tmp_path), "--dpi", "100"]) == 0
    whose = "the class token" if class_token else "all tokens"
    assert capsys.readouterr().err.splitlines()[0].endswith(f"the attention of {whose}")
    with Image.open(tmp_path / "green.maps.png") as figure:
        rows, columns = np.nonzero((np.asarray(figure.convert("RGB")) == (0, 255, 0)).all(axis=2))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height / width == pytest.approx(size[0] / size[1], rel=0.02)
    with np.load(tmp_path / "x.npz") as found:
        assert found["probabilities"].shape == (1, 0)
        assert found["class_attention"].shape == (1, 2, 24)


@pytest.mark.parametrize("text", ["US$$", "$\\frac$", os.fsdecode(b"caf\xe9")])
def test_texts_that_are_no_formulas_and_not_utf8(text: str, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    maps = core.model_token_maps(load(model), pixels)
    draw_maps(tmp_path / "maps.png", pixels[0], maps, 0, text, text, 2, 30)
    draw_slimming(tmp_path / "slimming.png", pixels, maps, [text])
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("maps.png", "slimming.png"))


def test_chosen_tokens() -> None:
    assignment = np.full((2, 4, 3), 0.25, np.float32)
    stage = core.StageMaps(1, assignment, assignment.swapaxes(1, 2))
    attention = (np.zeros((2, 4)), np.array([[0.1, 0.4, 0.1], [0.0, 0.0, 0.0]]), np.array([[0.3, 0.2, 0.1], [0, 0, 1]]))
    maps = core.TokenMaps((2, 2), (stage,), attention, np.zeros((2, 10), np.float32))
    assert maps.most_attended(0, 0, 2) == (1, 0)
    assert maps.most_attended(0, 1, 8) == (2, 0, 1)
    assert arrays_of(np.zeros((8, 8, 1)), maps, 1)["token_attention_1"] == pytest.approx([0, 0, 0.5])


def test_the_digits_split(
    tmp_path: pathlib.Path, digits_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[tuple[str, str]] = []

    def draw(path: pathlib.Path, *rest: Any) -> None:
        titles.append(rest[3:5])
        path.write_bytes(b"png")

    monkeypatch.setattr("sit_jax.visual.visualize.draw_maps", draw)
    random_weights.draw().save(tmp_path / "model")
    words = ["visualize", str(tmp_path / "model"), "--split", "test", "--name", "digits", "--data_dir", digits_dir]
    out, file = str(tmp_path / "figures"), tmp_path / "all.npz"
    assert cli.main([*words, "--limit", "3", "--output", out, "--arrays", str(file)]) == 0
    assert f"Written: {file} (3 images)" in capsys.readouterr().out
    with np.load(file) as found:
        assert list(found["pictures"]) == ["test-00000", "test-00001", "test-00002"]
        assert found["cumulative_1"].shape == (3, 2, 4)
        probabilities = found["probabilities"]
    source = open_source(DataConfig(name="digits", data_dir=digits_dir), "test")
    for index, ((title, says), row) in enumerate(zip(titles, probabilities, strict=True)):
        assert title == f"test-0000{index}"
        best = row.argmax()
        assert says.startswith(f"labelled {source[index].label}; predicted: class {best} {row[best]:.1%}, class ")
    # Arrays alone draw nothing.
    assert cli.main([*words, "--limit", "1", "--arrays", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "test-00000.npz").is_file()
    assert len(titles) == 3


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ("MODEL", "--split"),
        ("MODEL x.png --split test", "--split"),
        ("MODEL x.png --name digits", "--name"),
        ("MODEL --split test", "--name: "),
        ("MODEL IMAGE --output MODEL/config.json", "config.json"),
        ("MODEL IMAGE --arrays MODEL/config.json/x.npz", "x.npz"),
    ],
)
def test_mistakes(
    words: str, fact: str, model: pathlib.Path, photographs: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words.replace("MODEL", str(model)).replace("IMAGE", str(photographs / "china.jpg"))
    assert cli.main(["visualize", *words.split()]) == 2
    error = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("visualize: step")]
    assert len(error) == 1
    assert fact in error[0]


def test_the_page_about_it(
    model: pathlib.Path, photographs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pathlib.Path("docs/visualize.md").read_text()
    # Every array is in the table, and no other.
    maps = core.model_token_maps(load(model), random_weights.pixels(COLOUR, 1))
    written = {re.sub(r"_\d$", "_n", key) for key in arrays_of(np.zeros((8, 8, 3)), maps, 0)}
    table = text[text.index("| array |") : text.index("Patch `row")]
    assert set(re.findall(r"`([a-z_]+)`", table)) == {*written, "pictures", "class_names"}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(model)
    (tmp_path / "image.jpg").symlink_to(photographs / "flower.jpg")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(snippet, names)
    assert names["image"].shape == names["outlined"].shape == (384, 384, 3)
