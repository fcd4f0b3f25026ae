"""`sit report` and `sit demo` of runs and models without labels: similar images instead of classes."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import tiny
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from unlabelled import BACKBONES, command, write_images

from sit_jax.cli import app as cli
from sit_jax.data.registry import open_source
from sit_jax.data.sources import read_image
from sit_jax.demo.models import DemoModel, open_demo_models
from sit_jax.errors import UserError
from sit_jax.io.load import load, load_run
from sit_jax.io.model import Model
from sit_jax.report.charts import comparing_charts, run_charts
from sit_jax.report.evaluation import evaluate
from sit_jax.report.load_run import read_run
from sit_jax.visual.model_input import preprocess

WIDE = tiny.plain(
    image_size=(32, 48),
    in_channels=3,
    num_classes=0,
    stem="patch",
    patch_size=8,
    depth=2,
    stage_blocks=(1, 1),
    kept_tokens=(24, 6),
    class_token=False,
    pool="avg",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("unlabelled") / "images"
    write_images(root, 24)
    return root


@pytest.fixture(scope="module")
def finished(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("runs") / "slim"
    assert cli.main(command(folder, run, epochs=1)) == 0
    return run


def features(model: Model, images: list[Any]) -> np.ndarray:
    """The pooled features of a model's own module, without `Model.features`."""
    pixels = np.stack([preprocess(model.vit, model.data, image).pixels for image in images])
    normalized = (pixels / 255 - np.array(model.data.mean)) / np.array(model.data.std)
    outputs: Any = jax.jit(model.module.apply)(model.variables, jnp.asarray(normalized, jnp.float32))
    return np.asarray(outputs[1].features)


def test_report(finished: pathlib.Path) -> None:
    run = read_run(finished)
    assert run.missing == []
    assert run.similarity["cosine"] == json.loads((finished / "summary.json").read_text())["student"]["cosine"]
    charts = {chart.title: chart for chart in run_charts(run, "run")}
    assert charts.keys() == {
        "Loss, and its terms before weighting",
        "Similarity to the teacher",
        "Learning rates",
        "Gradient norm",
    }
    assert charts["Loss, and its terms before weighting"].headings == ["step", "loss", "token", "feature"]
    assert charts["Similarity to the teacher"].headings[:4] == ["step", "cosine", "agreement1", "agreement5"]
    assert "Evaluation: cosine" in [chart.title for chart in comparing_charts([run, run], "all")]
    unfinished = dataclasses.replace(run, summary={})
    assert unfinished.similarity["cosine"] == run.scores[-1]["cosine"]
    assert unfinished.entry("student")["gmac"] == run.entry("student")["gmac"]

    found = evaluate(run, examples=3)
    assert (found.classes, found.lost, len(found.examples)) == ([], [], 3)
    student = load_run(finished)
    assert found.maps is not None
    assert student.config is not None
    source = open_source(student.config.data, "val")
    images = [source[index] for index in range(len(source))]
    backbone = dataclasses.replace(load(BACKBONES / "hf_dinov2"), config=student.config)
    shared = {}
    for name, model in (("student", student), ("teacher", backbone)):
        values = features(model, images)
        search = NearestNeighbors(n_neighbors=4, metric="cosine").fit(values)
        for similar in found.similar:
            # The image itself is one of them.
            distances, nearest = search.kneighbors(values[[similar.image.index]], 5)
            others = nearest[0] != similar.image.index
            assert [x.image.index for x in similar.neighbours[name]] == nearest[0][others].tolist()
            cosines = [x.cosine for x in similar.neighbours[name]]
            np.testing.assert_allclose(cosines, 1 - distances[0][others], atol=1e-4)
            shared[name, similar.image.index] = set(nearest[0][others].tolist())
    for similar in found.similar:
        index = similar.image.index
        both = shared["student", index] & shared["teacher", index]
        for neighbours in similar.neighbours.values():
            assert {x.image.index for x in neighbours if x.shared} == both
    assert [x.image.index for x in found.similar] == [0, round((len(source) - 1) / 2), len(source) - 1]
    assert found.similar[0].image.label == pathlib.PurePath(images[0].name).name


def test_page_of_the_report(finished: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "one.html"
    assert cli.main(["report", str(finished), "--examples", "2", "--output", str(output)]) == 0
    text = output.read_text()
    body = text[: text.index('<script type="application/json"')]
    present = (
        "Similar images",
        "Where the tokens look",
        "cosine similarity to the teacher",
        "16/3",
        "labels are not used",
    )
    assert [x in body for x in present] == [True] * len(present)
    assert not [x for x in ("top-1", "Accuracy", "predict", "What is missing", "-classes-section") if x in body]
    assert cli.main(["report", str(finished), "--no_model", "--output", str(output)]) == 0
    assert "Similar images" not in output.read_text()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    place = tmp_path_factory.mktemp("models")
    for name, arch in (("student", WIDE), ("teacher", WIDE.without_slimming())):
        random_weights.draw(arch).save(place / name)
    return {name: place / name for name in ("student", "teacher")}


def check_similar(model: DemoModel, query: pathlib.Path, files: list[pathlib.Path]) -> list[tuple[Any, str]]:
    """The images that a model shows as similar, after they are compared with scikit-learn's."""
    shown = model.most_similar(model.preprocess(read_image(str(query))), None)
    values = features(model.model, [read_image(str(path)) for path in [query, *files]])
    search = NearestNeighbors(n_neighbors=6, metric="cosine").fit(values[1:])
    distances, nearest = (x[0] for x in search.kneighbors(values[:1]))
    assert model.gallery is not None
    for (small, caption), distance, index in zip(shown, distances, nearest, strict=True):
        assert float(caption) == pytest.approx(1 - distance, abs=2e-4)
        whole = np.asarray(Image.open(files[index]).convert("RGB"))
        np.testing.assert_array_equal(small, whole)  # As small as it is.
    return shown


def test_demo(wide: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    models = open_demo_models([wide["student"]], [wide["teacher"]], [str(folder)])
    files = sorted(folder.rglob("*.png"))
    (student,), (teacher,) = models.students.values(), models.teachers.values()
    page = pytest.importorskip("sit_jax.demo.page")
    theirs, mine, costs, _, _, text, _, tokens = page.classify(str(files[3]), teacher, student, None)
    for model, answer in ((student, mine), (teacher, theirs)):
        expected = check_similar(model, files[3], files)
        assert [caption for _, caption in answer] == [caption for _, caption in expected]
        assert expected[0][1] == "1.0000"  # The image itself is among them.
    assert "teacher " in costs
    assert "6 tokens after block 1" in text
    assert len(tokens) == 6
    # With fewer tokens, the other images are compared by the same model.
    fewer = list(student.keeps)[-1]
    assert page.classify(str(files[3]), None, student, fewer)[1][0][1] == "1.0000"
    assert page.classify(str(files[3]), None, student, None)[0] is None
    alone = open_demo_models([wide["student"]], [], [str(files[0])])
    assert alone.teachers == {}


def test_demo_of_a_run(finished: pathlib.Path) -> None:
    models = open_demo_models([finished], [])
    assert list(models.teachers) == [str(BACKBONES / "hf_dinov2")]
    (student,) = models.students.values()
    config = student.model.config
    assert config is not None
    source = open_source(config.data, "val")
    assert student.gallery is not None
    assert [x.name for x in student.gallery.examples] == [source[i].name for i in range(len(source))]


def test_mistakes(wide: dict[str, pathlib.Path], folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with_head = tmp_path / "with_head"
    random_weights.draw(dataclasses.replace(WIDE, num_classes=3)).save(with_head)
    for student, images in (
        (wide["student"], []),
        (wide["student"], [str(tmp_path / "broken.png")]),
        (with_head, [str(folder)]),
    ):
        teachers = [] if student != with_head else [with_head]
        with pytest.raises(UserError, match="--images: "):
            open_demo_models([student], teachers, images)
