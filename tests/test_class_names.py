"""Models and data sets whose classes have names: in the same order, in another one, or others altogether."""

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import images
import jax
import numpy as np
import pytest
import tiny

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.config import Config, DataConfig, LossConfig, ModelConfig, TeacherConfig
from sit_jax.data.classes import match_classes
from sit_jax.data.sources import Example
from sit_jax.errors import ConfigError, RunError, UserError
from sit_jax.io import runs as workdir
from sit_jax.parallel.sharding import make_mesh
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.init import given_teacher, initial_state
from sit_jax.training.loop import run
from sit_jax.training.step import make_train_spec

NAMES = ("ant", "cat", "dog")


def write_images(root: pathlib.Path, names: Sequence[str], per_class: int = 10) -> pathlib.Path:
    """Noise around another grey for each class, by its place in the alphabet."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 60, (32, 32, 3)) + 60 * (ord(name[0]) - ord("a"))
            (root / name / f"{index}.jpg").write_bytes(images.jpeg(pixels.clip(0, 255).astype(np.uint8)))
    return root


def save_model(folder: pathlib.Path, names: Sequence[str] | None, columns: Sequence[int] = (0, 1, 2)) -> pathlib.Path:
    """A model folder of random weights with the head's columns in some order."""
    model = sit_jax.create_model("deit_tiny", num_classes=3, image_size=32, depth=1)
    head = model.variables["params"]["head"]
    head["kernel"] = head["kernel"][:, np.array(columns)]
    if names is not None:
        model.metadata["class_names"] = list(names)
    model.save(folder)
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *words: Any) -> Any:
    """What `sit evaluate` prints: its result, or the line on standard error."""
    code = cli.main(["evaluate", *map(str, words), "--json"])
    captured = capsys.readouterr()
    if code:
        assert (code, len(captured.err.strip().splitlines())) == (2, 1), captured.err
        return captured.err
    return json.loads(captured.out)


def test_evaluation_matches_classes_by_name(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--name", "folder", "--split", "val", "--data_dir", write_images(tmp_path / "images", NAMES)]
    same = evaluate(capsys, save_model(tmp_path / "same", NAMES), *data, "--val_fraction", "0.5")
    assert same["examples"] == 15
    assert "top5" not in same  # There are three classes.
    assert cli.main(["evaluate", str(tmp_path / "same"), *map(str, data)]) == 0
    assert "top-5" not in capsys.readouterr().out
    turned = save_model(tmp_path / "turned", ("dog", "ant", "cat"), (2, 0, 1))
    assert evaluate(capsys, turned, *data, "--val_fraction", "0.5") == pytest.approx(same)
    # By index the classes are others, and so is the loss.
    by_index = evaluate(capsys, turned, *data, "--held_out", "0.5", "--match_classes", "index")
    assert by_index["loss"] != pytest.approx(same["loss"], rel=1e-3)
    # Without names, or with numbers for names, the index is all there is.
    for folder, names in (("unnamed", None), ("numbered", ("0", "1", "2"))):
        assert evaluate(capsys, save_model(tmp_path / folder, names), *data, "--held_out", "0.5") == pytest.approx(same)


class Several(list[Example]):
    """Images with several correct classes."""

    class_names: Sequence[str] = NAMES
    multi_label = True


@pytest.mark.parametrize(("names", "missing"), [(("cat", "dog", "eel"), "ant"), (("cat", "cat", "ant"), "dog")])
def test_other_classes_are_refused_with_the_differences(names: Sequence[str], missing: str) -> None:
    with pytest.raises(UserError, match=rf"class names.*differ: .*{missing}"):
        match_classes(Several(), names, "the model")


NUMBERS = [str(index) for index in range(12)]


@pytest.mark.parametrize("names", [None, NUMBERS, list("abcdefghijkl"), sorted(NUMBERS)])
def test_numbered_folders_are_matched_by_number(
    names: Sequence[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Several([Example(b"", label=2)])
    source.class_names = sorted(NUMBERS)  # As folders are: the third is 10.
    in_order = names == source.class_names
    matched = match_classes(source, names, f"the model with {names}")
    assert matched[0].label == (2 if in_order else 10)
    assert len(matched.class_names) == 12
    assert ("by number" in capsys.readouterr().err) != in_order


def test_unicode_forms_of_a_class_name_are_equal() -> None:
    source = Several([Example(b"", label=0)])
    source.class_names = ["cafe\u0301", "bar"]
    assert match_classes(source, ["bar", "caf\u00e9"], "the model")[0].label == 1


def test_several_correct_classes_are_renumbered() -> None:
    several = match_classes(Several([Example(b"", label=2, labels=(2, 0))]), ["dog", "ant", "cat"], "the model")
    assert (several[0].label, several[0].labels, several.multi_label) == (0, (0, 1), True)


def config(folder: pathlib.Path, **changes: Any) -> Config:
    """A model that is trained for an epoch on a flat folder, of which it holds out 40%."""
    data = DataConfig(name="folder", data_dir=str(folder), eval_split="val", val_fraction=0.4, on_decode_error="skip")
    return tiny.folder_config(data, 3, **{"epochs": 1, "batch_size": 16, "eval_batch_size": 8, **changes})


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", NAMES)


@pytest.fixture(scope="module")
def trained(image_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run on the folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(config(image_folder), folder)
    return folder


def test_an_exported_run_is_evaluated_on_the_images_it_was_not_trained_on(
    trained: pathlib.Path, image_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "dog" / "9.jpg").write_bytes(b"broken")  # One of the four that are held out.
    data = ["--data_dir", tmp_path / "images"]
    assert cli.main(["evaluate", "--workdir", str(trained), *map(str, data)]) == 0
    assert capsys.readouterr().err.startswith("1 of 12 images ")
    of_run = evaluate(capsys, "--workdir", trained, *data)
    assert of_run["examples"] == 11
    assert cli.main(["export", str(trained), str(tmp_path / "model"), "--format", "folder"]) == 0
    capsys.readouterr()
    assert evaluate(capsys, tmp_path / "model", *data) == pytest.approx(of_run)
    assert "9.jpg" in evaluate(capsys, tmp_path / "model", *data, "--on_broken", "error")


def test_teachers_and_first_weights_are_put_into_the_datas_order(
    tmp_path: pathlib.Path, image_folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = save_model(tmp_path / "same", NAMES)
    turned = save_model(tmp_path / "turned", ("dog", "ant", "cat"), (2, 0, 1))
    other = save_model(tmp_path / "other", ("cat", "dog", "eel"))
    model = ModelConfig(architecture=sit_jax.load(same).arch)

    def teacher(folder: pathlib.Path, **changes: Any) -> TeacherConfig:
        return TeacherConfig(model=model, run=str(folder), **changes)

    expected = sit_jax.load(same).variables["params"]["head"]["kernel"]
    for folder in (same, turned):
        head = given_teacher(teacher(folder), "teacher", NAMES)["params"]["head"]
        np.testing.assert_array_equal(head["kernel"], expected)
    by_index = given_teacher(teacher(turned, match_classes="index"), "teacher", NAMES)["params"]["head"]["kernel"]
    np.testing.assert_array_equal(by_index, expected[:, np.array((2, 0, 1))])
    # Before the run's folder is made.
    distilled = config(image_folder, model=model, teacher=teacher(other), loss=LossConfig(logits=1.0), init="random")
    with pytest.raises(ConfigError, match=r"^teacher\.run: .*eel.*ant"):
        run(distilled, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # Weights to start from need not be of the same classes: their heads are new then.
    for init, drawn in ((turned, False), (other, True)):
        task = make_train_spec(config(image_folder, model=model, init=str(init)), 1)
        with Checkpoints(tmp_path / "empty") as checkpoints:
            state = initial_state(task, checkpoints, make_mesh(devices=jax.devices()[:1]), {}, NAMES)
        assert np.array_equal(state.params["model"]["head"]["kernel"], expected) != drawn
        assert ("eel" in capsys.readouterr().err) == drawn


def test_a_run_knows_its_classes_when_its_folder_has_others(
    trained: pathlib.Path, image_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workdir.read_class_names(trained) == list(NAMES)
    other = write_images(tmp_path / "other", ("cat", "dog", "eel"))
    assert "eel" in evaluate(capsys, "--workdir", trained, "--data_dir", other)
    with pytest.raises(RunError, match="other classes"):
        run(config(other), trained, resume=True)
    assert workdir.read_class_names(trained) == list(NAMES)
