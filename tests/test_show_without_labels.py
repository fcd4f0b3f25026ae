"""`sit report` of runs without labels: similar images instead of classes."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from unlabelled import BACKBONES, command, write_images

from sit_jax.cli import app as cli
from sit_jax.data.registry import open_source
from sit_jax.io.load import load, load_run
from sit_jax.io.model import Model
from sit_jax.report.charts import comparing_charts, run_charts
from sit_jax.report.evaluation import evaluate
from sit_jax.report.load_run import read_run
from sit_jax.visual.model_input import preprocess


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
