"""Distillation without labels: images without classes, losses, evaluation against the teacher, and probes."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from unlabelled import BACKBONES, command, write_images

from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.probe import knn_accuracy, linear_probe
from sit_jax.cli import app as cli
from sit_jax.cli.config_file import load_config
from sit_jax.config import Config, LossConfig, MixConfig, ModelConfig, TeacherConfig
from sit_jax.config.config_dict import from_config_dict, to_dict
from sit_jax.config.resume import changes
from sit_jax.data.config import DataConfig
from sit_jax.data.folder import ImagesSource
from sit_jax.data.pipeline import Hosts, TrainData, eval_batches
from sit_jax.data.registry import open_source
from sit_jax.errors import ConfigError, NotFiniteError, RunError, UserError
from sit_jax.io.load import load_run, read_weights
from sit_jax.io.runs import read_config
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding
from sit_jax.training.evaluate import model_features
from sit_jax.training.init import given_teacher
from sit_jax.training.loop import resolve_num_classes
from sit_jax.training.metrics import feature_metrics, read_metrics
from sit_jax.training.step import init_state, make_train_spec, make_train_step

HEADLESS = dataclasses.replace(tiny.SLIMMED, num_classes=0)
WITHOUT = LossConfig(classification=0.0, feature=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("unlabelled") / "images"
    write_images(root, 12)
    return root


@pytest.fixture(scope="module")
def finished(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("runs") / "slim"
    assert cli.main(command(folder, run)) == 0
    return run


def config(loss: LossConfig = WITHOUT, student: Architecture = HEADLESS, **changes: Any) -> Config:
    """A student's configuration with a trained teacher."""
    teacher = TeacherConfig(model=ModelConfig(architecture=student.without_slimming()), run="weights")
    return tiny.config(loss, model=ModelConfig(architecture=student), teacher=teacher, **changes)


def names(source: Any) -> set[str]:
    return {source[index].name for index in range(len(source))}


def test_flat_folder(folder: pathlib.Path) -> None:
    train, val = ImagesSource(folder, "train", 0.25), ImagesSource(folder, "val", 0.25)
    assert (len(train), len(val), len(names(train) | names(val))) == (9, 3, 12)
    assert (train.class_names, train[0].label, train.notes) == ((), -1, [])
    assert len(ImagesSource(folder, "train[:4]", 0.25)) == 4
    with pytest.raises(ConfigError) as caught:
        open_source(DataConfig(name="images", data_dir=str(folder / "nowhere")), "train")
    assert caught.value.key == "data.data_dir"


def test_splits_are_those_of_a_folder_with_classes(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "outer" / "images"
    write_images(root / "training", 4)
    write_images(root / "Val", 3)
    train, val = ImagesSource(root, "train"), ImagesSource(root, "val")
    assert [len(train), len(val), len(train.notes), len(val.notes)] == [4, 3, 1, 1]
    with pytest.raises(ConfigError) as caught:
        ImagesSource(root.parent, "train")
    assert caught.value.key == "data.data_dir"
    assert str(root) in caught.value.problem
    # Beside other images, they are folders like any other.
    (root / "x.png").write_bytes((root / "Val" / "01.png").read_bytes())
    assert len(ImagesSource(root, "train", 0.25)) + len(ImagesSource(root, "val", 0.25)) == 8


def test_list_of_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    listing = folder / "list.txt"
    files = [str(folder / "01.png"), "more/00.png", "02.png", "02.png", "more/03.png", ""]
    listing.write_bytes("\r\n".join(files).encode())
    train, val = (ImagesSource(listing, split, 0.25) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 1)
    assert names(train) | names(val) == {str(folder / x) for x in files if x}
    listing.unlink()
    for content in (b"a\0b", b"\n"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(UserError, match="other"):
            ImagesSource(tmp_path / "other", "train")


class NoLabels(tfds.core.GeneratorBasedBuilder):
    """Images only."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {"image": tfds.features.Image(shape=(None, None, 3))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> Any:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        for index in range(4):
            encoded = io.BytesIO()
            Image.new("RGB", (8, 8), (index, 0, 0)).save(encoded, "PNG")
            encoded.seek(0)
            yield index, {"image": encoded}


def test_tfds_set_without_labels(tmp_path: pathlib.Path) -> None:
    NoLabels(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = open_source(DataConfig(name="no_labels", data_dir=str(tmp_path)), "train")
    assert (len(source), source.class_names, source[0].label) == (4, (), -1)


def test_labels_that_are_there_are_ignored(digits_dir: str) -> None:
    inputs = config(data=DataConfig(data_dir=digits_dir), batch_size=8).inputs
    with contextlib.closing(TrainData(inputs, Hosts()).batches()) as batches:
        assert next(batches)["image"].shape == (8, 32, 32, 1)
    source = open_source(inputs.data, "test[:5]")
    (batch,) = eval_batches(inputs, source, Hosts())
    assert batch["mask"].sum() == 5


def test_data_without_classes_is_refused_where_labels_are_used(folder: pathlib.Path) -> None:
    data = DataConfig(name="images", data_dir=str(folder), eval_split="val")
    for classes, check in ((8, lambda x: TrainData(x.inputs, Hosts())), (0, resolve_num_classes)):
        with pytest.raises(ConfigError) as caught:
            check(tiny.folder_config(data, num_classes=classes))
        assert caught.value.key == "data.name"


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"loss": {"feature": 0.0}}, "loss.classification"),
        ({"loss": {"logits": 1.0}}, "loss.logits"),
        ({"teacher": None}, "teacher"),
        ({"teacher": None, "loss": {"classification": 1.0}}, "teacher"),
        ({"teacher": {"run": ""}}, "teacher.run"),
        ({"model": {"projection": 8}}, "loss.feature"),
        ({"model": {"projection": 8}, "loss": {"feature": 0.0, "token": 1.0}}, "loss.feature"),
    ],
)
def test_what_needs_labels_or_a_teacher(changed: dict[str, Any], key: str) -> None:
    values = to_dict(config())
    for section, fields in changed.items():
        values[section] = fields and {**values[section], **fields}
    with pytest.raises(ConfigError) as caught:
        from_config_dict(values)
    assert caught.value.key == key


def step(made: Config) -> tuple[dict[str, float], Any, Any]:
    """Metrics of a step from the teacher's weights, its update of the parameters, and those before."""
    assert made.teacher is not None
    arch = made.teacher.model.architecture
    teacher = jax.jit(build_model(arch).init)(jax.random.key(7), np.zeros((1, 32, 32, 1), np.float32))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    spec = make_train_spec(made, steps_per_epoch=10)
    state = init_state(spec, mesh, teacher)
    before = jax.tree.map(np.array, state.params)
    batch = {**tiny.batch(made.batch_size), "label": jnp.full(made.batch_size, -1)}
    state, metrics = make_train_step(spec, mesh)(state, batch, {"teacher": teacher})
    return {name: float(x) for name, x in metrics.items()}, jax.tree.map(np.array, state.params), before


@pytest.mark.parametrize("error", ["mse", "cosine"])
@pytest.mark.parametrize("mix", [MixConfig(), MixConfig(mixup=0.8, cutmix=1.0), MixConfig(mix_token=1.0)], ids=str)
def test_headless_step(error: Any, mix: MixConfig) -> None:
    loss = LossConfig(classification=0.0, token=0.5, feature=2.0, feature_error=error, label_smoothing=0.1)
    metrics, after, before = step(config(loss, mix=mix))
    assert metrics.keys() == {"loss", "token", "feature", "grad_norm", "lr/model", "lr/rtsm"}
    assert metrics["loss"] == pytest.approx(0.5 * metrics["token"] + 2 * metrics["feature"], rel=1e-5)
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), after["model"], before["model"])
    assert moved["slimming_0"]["fc1"]["kernel"] > 0
    assert moved["blocks_1"]["mlp"]["fc2"]["kernel"] > 0
    assert "head" not in after["model"]


def test_classification_is_a_weight_and_unlabelled_examples_add_nothing() -> None:
    loss = LossConfig(classification=0.25, feature=1.0, label_smoothing=0.1)
    metrics, _, _ = step(config(loss, tiny.SLIMMED))
    assert metrics["classification"] == metrics["accuracy"] == 0
    assert metrics["loss"] == pytest.approx(metrics["feature"])


def test_on_resume() -> None:
    before = config(student=tiny.SLIMMED, loss=LossConfig(classification=1.0, feature=1.0))
    for weight, effect in ((0.5, "later"), (0.0, "other")):
        now = dataclasses.replace(before, loss=LossConfig(classification=weight, feature=1.0))
        (change,) = changes(before, now)
        assert (change.key, change.effect) == ("loss.classification", effect)


# Evaluation


def neighbours(features: np.ndarray, k: int) -> list[set[int]]:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    return [set(row[:k].tolist()) for row in np.argsort(-similar, axis=1)]


def test_feature_metrics() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(30, 8)).astype(np.float32)
    mine = theirs + 0.5 * rng.normal(size=theirs.shape).astype(np.float32)
    found = feature_metrics(mine, theirs)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(mine, theirs, strict=True)]
    expected = {"cosine": np.mean(cosines), "examples": 30}
    for k in (1, 5):
        pairs = zip(neighbours(mine, k), neighbours(theirs, k), strict=True)
        expected[f"agreement{k}"] = np.mean([len(a & b) / k for a, b in pairs])
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found["agreement5"] < 1
    # Scale does not matter, and equal images are neighbours, but none is its own.
    assert feature_metrics(3 * theirs, theirs)["agreement5"] == 1
    twins = np.repeat(theirs[:4], 3, axis=0)
    assert feature_metrics(twins, twins)["agreement1"] == 1
    assert feature_metrics(theirs[:2], theirs[:2]).keys() == {"cosine", "agreement1", "examples"}
    with pytest.raises(NotFiniteError):
        feature_metrics(theirs * np.nan, theirs)
    with pytest.raises(RunError):
        feature_metrics(theirs[:0], theirs[:0])


def test_probes_are_scikit_learns() -> None:
    features, labels = load_digits(return_X_y=True)
    split = (features[:300], labels[:300], features[300:600], labels[300:600])
    model = KNeighborsClassifier(5, metric="cosine").fit(*split[:2])
    assert knn_accuracy(*split) == pytest.approx(model.score(*split[2:]), abs=0.01)
    mean, std = split[0].mean(0), np.where(split[0].std(0) > 0, split[0].std(0), 1)
    scaled = [(x - mean) / std for x in (split[0], split[2])]
    probe = LogisticRegression(max_iter=1000).fit(scaled[0], split[1])
    assert linear_probe(*split) == pytest.approx(probe.score(scaled[1], split[3]), abs=0.01)
    assert linear_probe(*split) > 0.8


# Runs


def test_run(finished: pathlib.Path, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = read_metrics(finished)
    kinds = [(line["step"], line["kind"]) for line in lines]
    assert kinds == [(1, "train"), (1, "eval"), (2, "train"), (2, "eval")]
    assert lines[-1].keys() > {"cosine", "agreement1", "ema_cosine"}
    made = read_config(finished)
    assert made.model.architecture.num_classes == 0
    assert not (finished / "class_names.json").exists()
    # What the trainer says is what the models' own features say.
    student, backbone = load_run(finished), read_weights(BACKBONES / "hf_dinov2")
    mine, theirs = (model_features(x, made.data, "val").values[:3] for x in (student, backbone))
    again = feature_metrics(mine, theirs)
    assert again == pytest.approx({name: lines[-1][name] for name in again}, abs=1e-5)
    capsys.readouterr()
    assert cli.main(["evaluate", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(again, abs=1e-5)
    assert json.loads((finished / "summary.json").read_text())["student"]["cosine"] == pytest.approx(again["cosine"])
    assert cli.main(["checkpoint", "list", "--workdir", str(finished), "--json"]) == 0
    best = max((line for line in lines if line["kind"] == "eval"), key=lambda line: line["cosine"])
    assert [x["step"] for x in json.loads(capsys.readouterr().out) if x["best"]] == [best["step"]]
    saved = finished.parent / "saved"
    student.save(saved)
    assert cli.main(["evaluate", str(saved), "--name", "images", "--data_dir", str(folder)]) == 2  # No teacher.


def test_resume(finished: pathlib.Path, folder: pathlib.Path) -> None:
    assert cli.main(command(folder, finished)) == 2
    assert cli.main([*command(folder, finished, epochs=3), "--resume"]) == 0
    lines = read_metrics(finished)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [1, 2, 3]
    assert lines[-1]["cosine"] == pytest.approx(lines[-3]["cosine"], abs=0.1)


def test_probe_of_a_run(finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(finished), "--probe"]) == 2  # Images without classes.
    assert "data.name" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    for index in range(40):  # Dark and bright images.
        (path := tmp_path / f"{index % 2}" / f"{index}.png").parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 99, (8, 8, 3), np.uint8) + np.uint8(150 * (index % 2))).save(path)
    words = ["--name", "folder", "--data_dir", str(tmp_path), "--val_fraction", "0.2", "--probe", "--json"]
    assert cli.main(["evaluate", str(finished), *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {name: {"knn": 1.0, "linear": 1.0} for name in ("teacher", "student")}


@pytest.mark.parametrize(
    "words",
    [
        "plan --topology cpu:2",
        "train --print_sharding --workdir none --coordinator=localhost:PORT --num_processes=1 --process_id=0",
    ],
)
def test_devices_are_set_up_before_the_backbone_is_read(words: str, folder: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    given = [*words.replace("PORT", port).split(), *command(folder, folder)[1:3], f"--config.data.data_dir={folder}"]
    given += ["--config.data.val_fraction=0.33", "--config.batch_size=8"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "sit_jax", *given], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backbone", ["hf_clip", "hf_siglip", "hf_dinov2_classifier", "timm_gap"])
def test_config_of_a_backbone(backbone: str, folder: pathlib.Path) -> None:
    made = load_config(f"features:{BACKBONES / backbone}", [f"--config.data.data_dir={folder}"])
    arch, whole = made.model.architecture, read_weights(BACKBONES / backbone).vit
    assert isinstance(arch, Architecture)
    assert arch.is_slimmed
    assert arch.num_classes == 0
    assert arch.without_slimming() == dataclasses.replace(whole, num_classes=0)
    assert (made.loss.feature_error == "cosine") == (backbone in ("hf_clip", "hf_siglip"))
    assert made.teacher is not None
    assert "head" not in given_teacher(made.teacher, "teacher")["params"]
    assert count_cost(arch).gmac < count_cost(whole).gmac


def test_the_page(
    finished: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", pathlib.Path("docs/features.md").read_text(), re.DOTALL)
    links = {"runs/small": finished, "images": folder, "models/dinov2-small": (BACKBONES / "hf_dinov2").absolute()}
    # The run names its teacher by a relative path.
    links |= {name: pathlib.Path(name).absolute() for name in ("tests", "configs")}
    monkeypatch.chdir(tmp_path)
    for link, target in links.items():
        (path := tmp_path / link).parent.mkdir(exist_ok=True)
        path.symlink_to(target)
    for index in range(8):
        (path := tmp_path / f"photos/{'train' if index < 6 else 'val'}/{index % 2}/{index}.png").parent.mkdir(
            parents=True, exist_ok=True
        )
        Image.new("RGB", (32, 32), (index, 99 * (index % 2), 0)).save(path)
    seen = 0
    for language, text in blocks:
        if language == "python":
            exec(text, {"images": np.zeros((1, 32, 32, 3), np.uint8)})
            continue
        for line in text.splitlines():
            words = shlex.split(line)
            # Training is `finished`; the other data set would be downloaded.
            if words[1] != "train" and "cifar100" not in words:
                assert cli.main(words[1:]) == 0, line
                seen += 1
    assert seen == 11
    with np.load("small.npz") as found:
        assert found["features"].shape == (12, 16)
