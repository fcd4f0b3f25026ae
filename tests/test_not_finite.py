"""What went wrong is not reported as a success: ties, NaN, a split in which nothing counts."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sit_jax
from sit_jax.analysis.checkpoints import list_checkpoints, verify
from sit_jax.cli import app as cli
from sit_jax.config import CheckpointConfig, Config, DataConfig, LossConfig, ModelConfig, OptimConfig
from sit_jax.config.config_dict import to_dict
from sit_jax.errors import NotFiniteError, RunError
from sit_jax.io import runs as workdir
from sit_jax.parallel import sharding
from sit_jax.report.load_run import read_run
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.init import initial_state
from sit_jax.training.loop import run
from sit_jax.training.metrics import EvalMetrics, eval_metrics
from sit_jax.training.step import make_train_spec


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    mask = np.ones(len(logits), np.float32)
    metrics = eval_metrics(*(jnp.asarray(x) for x in (logits, labels, mask)))
    return EvalMetrics.empty().merge(metrics).result("test")


@pytest.mark.parametrize("classes", [3, 17])
def test_ties_rank_as_argmax_ranks_them(classes: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 3, (400, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 400).astype(np.int32)
    result = score(logits, labels)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert result["top1"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
    if classes < 5:
        assert "top5" not in result
    else:
        assert result["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())
    # Several right classes, in any order: the image is right where one of them is.
    several = np.stack([labels, (labels + 2) % classes, np.full(400, -1, np.int32)], axis=1)[:, [1, 0, 2]]
    assert score(logits, several)["top1"] == pytest.approx((order[:, :1] == several).any(axis=1).mean())
    assert score(np.zeros_like(logits), labels)["top1"] == pytest.approx((labels == 0).mean())


def test_an_evaluation_with_nan_or_without_examples_is_refused() -> None:
    logits, labels = np.eye(4, dtype=np.float32), np.arange(4, dtype=np.int32)
    assert score(logits, labels)["top1"] == 1.0
    for bad in (np.nan, np.inf, -np.inf):
        logits[2, 2] = bad
        with pytest.raises(NotFiniteError, match=r"^test: "):
            score(logits, labels)
    nothing = eval_metrics(jnp.eye(4), jnp.arange(4), jnp.zeros(4))
    with pytest.raises(RunError, match=r"^test: no example"):
        nothing.result("test")
    # Without the loss's help, too: an image with a NaN among its logits is wrong.
    with_nan = eval_metrics(jnp.eye(5).at[1, 3].set(jnp.nan), jnp.arange(5), jnp.ones(5))
    assert float(with_nan.top1.compute()) == float(with_nan.top5.compute()) == pytest.approx(0.8)


def one_step(digits_dir: str, optim: OptimConfig, **changes: Any) -> Config:
    """A model that is trained for one step, then evaluated."""
    data = DataConfig(data_dir=digits_dir, train_split="train[:64]", eval_split="test[:32]")
    fields: dict[str, Any] = {"optim": optim, "epochs": 1, "batch_size": 64, "eval_batch_size": 32}
    model = ModelConfig(architecture=tiny.TEACHER)
    return tiny.config(LossConfig(), model=model, teacher=None, data=data, **{**fields, **changes})


EACH_STEP = {"eval_every_epochs": 2, "epochs": 2, "checkpoint": CheckpointConfig(every_steps=1)}


@pytest.mark.parametrize(
    ("optim", "changes", "stops_at", "saved"),
    [
        ({"lr": 1e38}, {}, 1, None),  # By its evaluation.
        ({"lr": 1e30, "weight_decay": 1e30}, EACH_STEP, 1, None),  # By its weights, before they are saved.
        ({"lr": 1e38}, EACH_STEP, 2, 1),  # By the loss: it comes from the weights of the checkpoint.
    ],
)
def test_a_run_that_went_wrong_ends_in_one_line_that_calls_no_checkpoint_good(
    optim: dict[str, Any], changes: Any, stops_at: int, saved: int | None, digits_dir: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(NotFiniteError, match=f"^step {stops_at}: ") as raised:
        run(one_step(digits_dir, OptimConfig(**optim), **changes), tmp_path)
    assert len(str(raised.value).splitlines()) == 1
    assert "no good checkpoint" in str(raised.value)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (saved, None)


@pytest.fixture(scope="module")
def sick(digits_run: pathlib.Path, digits_config: Config, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run as older versions left it: its newest checkpoint is not finite, and its evaluation claims 100%."""
    folder = tmp_path_factory.mktemp("sick") / "run"
    shutil.copytree(digits_run, folder)
    task = make_train_spec(digits_config, 11)
    with Checkpoints(folder, keep=5) as checkpoints:
        state: Any = initial_state(task, checkpoints, sharding.make_mesh(), {})
        metadata = checkpoints.metadata()
        params = jax.tree.map(lambda x: x, state.params)
        params["model"]["norm"]["bias"] = params["model"]["norm"]["bias"].at[3].set(jnp.nan)
        metrics = {"top1": 1.0, "top5": 1.0, "loss": float("nan")}
        checkpoints.save(state.replace(step=jnp.asarray(33, jnp.int32), params=params), metrics, metadata)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 33, "kind": "eval", "time": 0.0, **metrics}) + "\n")
    return folder


def test_a_checkpoint_that_is_not_finite_is_never_the_best(sick: pathlib.Path) -> None:
    entries = {entry.step: entry for entry in list_checkpoints(sick)}
    assert entries[33].newest
    assert not entries[33].best
    with Checkpoints(sick) as checkpoints:
        assert checkpoints.best_step in (11, 22)
        assert checkpoints.is_best({"top1": 1.0, "loss": 0.1})
        assert not checkpoints.is_best({"top1": 1.0, "loss": float("nan")})
    problems = verify(sick).problems
    assert "model/params/norm/bias: 1 of 16 values are not finite" in problems
    assert any(problem.startswith("metrics: loss ") for problem in problems)
    record = read_run(sick)
    assert [line["step"] for line in record.scores] == [11, 22]
    assert any("step 33 is not finite" in sentence for sentence in record.missing)


def test_every_command_refuses_weights_that_are_not_finite(
    sick: pathlib.Path, digits_config: Config, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = pathlib.Path("docs/figures/test-00000.maps.png")
    for words in (
        ["evaluate", "--workdir", sick],
        ["predict", sick, picture],
        ["visualize", sick, picture, "--output", tmp_path / "maps"],
        ["export", sick, tmp_path / "folder", "--format", "folder"],
        ["convert", sick, tmp_path / "converted"],
        ["benchmark", sick, "--batch_sizes", "1", "--seconds", "0.1"],
    ):
        assert cli.main([str(word) for word in words]) == 2, words
        captured = capsys.readouterr()
        error = captured.err.strip().splitlines()[-1]
        assert error.startswith(f"sit {words[0]}: checkpoint 33 in {sick}: params/norm/bias "), error
        assert "100.00%" not in captured.out
        assert not list(tmp_path.iterdir())
    longer = dataclasses.replace(digits_config, epochs=4)
    workdir.write_json(sick / "config.json", to_dict(longer))
    with pytest.raises(NotFiniteError, match=r"^checkpoint 33 in .* move 33 away to go on from step 22$"):
        run(longer, sick, resume=True)


def test_outputs_that_overflow_say_nothing() -> None:
    model = sit_jax.create_model("deit_tiny", num_classes=3, image_size=32, depth=1)
    kernel = model.variables["params"]["head"]["kernel"]
    model.variables["params"]["head"]["kernel"] = jnp.full_like(kernel, 3e38)
    with pytest.raises(NotFiniteError, match=r"^the model: "):
        model.logits(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8))
