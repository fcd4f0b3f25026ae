"""`sit tune`: the schedule for a budget, and reducers for a model that has none."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import tiny
from PIL import Image

import sit_jax
from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.redundancy import propose, redundancy
from sit_jax.analysis.tune import Budget, Runtime, candidate_schedules, tune
from sit_jax.cli import app as cli
from sit_jax.cli.config_file import load_config
from sit_jax.config.config_dict import from_config_dict
from sit_jax.config.files import get_config
from sit_jax.data.config import DataConfig, InputSpec
from sit_jax.data.pipeline import Hosts, eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import open_source
from sit_jax.errors import UserError
from sit_jax.models import build_model
from sit_jax.training.evaluate import evaluate_model
from sit_jax.training.step import make_train_spec


def test_candidates_are_between_the_trained_schedules() -> None:
    arch = tiny.plain(image_size=224, stage_blocks=(2, 1, 1), kept_tokens_choices=((196, 100, 64), (196, 25, 4)))
    assert candidate_schedules(arch, 1) == [(196, 100, 64), (196, 50, 16), (196, 25, 4)]
    # With the class token, a multiple of 8.
    assert candidate_schedules(arch, 1, rows=8) == [(196, 100, 64), (196, 55, 23), (196, 25, 4)]
    alone = tiny.plain(image_size=224, stage_blocks=(2, 2), keep_ratio=0.5)
    assert candidate_schedules(alone, 0) == [(196, 98), (196, 39)]


def tuned(capsys: pytest.CaptureFixture[str], run: pathlib.Path, *words: str) -> Any:
    assert cli.main(["tune", str(run), "--seconds", "0.1", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_best_schedule_within_a_budget(elastic_run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = [count_cost(sit_jax.load(elastic_run, kept_tokens=kept).vit).gmac for kept in tiny.CHOICES]
    result = tuned(capsys, elastic_run, "--gmac", str(costs[1]))
    rows = result["rows"]
    assert [tuple(row["kept_tokens"]) for row in rows] == list(tiny.CHOICES)
    np.testing.assert_allclose([row["gmac"] for row in rows], costs)
    assert rows[0]["score"] is None
    for row in rows[1:]:
        expected = evaluate_model(sit_jax.load(elastic_run, kept_tokens=row["kept_tokens"]))["top1"]
        assert row["score"] == pytest.approx(expected)
    assert rows[result["chosen"]]["score"] == max(row["score"] for row in rows[1:])
    slow = tuned(capsys, elastic_run, "--latency_ms", "1e6", "--batch", "2")
    assert all(row["score"] is not None and row["latency_ms"] > 0 for row in slow["rows"])
    newest = str(max(int(path.name) for path in (elastic_run / "checkpoints").iterdir() if path.name.isdecimal()))
    assert (
        cli.main(["tune", str(elastic_run), "--gmac", "1", "--seconds", "0.1", "--step", newest, "--between", "0"]) == 0
    )
    commands = capsys.readouterr().out.splitlines()[-2:]
    assert all(f"--step {newest} --kept_tokens" in command for command in commands)
    fast = max(row["images_per_s"] for row in slow["rows"])
    assert tuned(capsys, elastic_run, "--images_per_s", str(fast / 100))["rows"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--latency_ms", "1e-6"], "--latency_ms"),
        (["--images_per_s", "1e8"], "--images_per_s"),
        ([], "--gmac"),
        (["--gmac", "1e-9"], "--gmac"),
        (["--gmac", "1", "--topology", "v5e:2x4"], "--topology"),
        (["--gmac", "1", "--topology", "v5e:1x1", "--target", "onnxruntime"], "--topology"),
        (["--gmac", "1", "--before_training"], "slimmed"),
        (["--gmac", "1", "--output", "new.py"], "--output"),
        (["--gmac", "1", "--limit", "5"], "--limit"),
        (["--gmac", "1", "--before_training", "--batch", "5"], "--batch"),
        (["--gmac", "1", "--target", "onnxruntime", "--dtype", "bfloat16"], "--dtype"),
        (["--gmac", "1", "--split", "nowhere"], "nowhere"),
        (["--gmac", "1", "--name", "images", "--data_dir", "docs/figures", "--split", "train"], "data.name"),
    ],
)
def test_budgets_that_are_not_possible(
    elastic_run: pathlib.Path, words: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [] if "--before_training" in words else ["--seconds", "0.1", "--between", "0"]
    assert cli.main(["tune", str(elastic_run), *short, *words]) == 2
    assert key in capsys.readouterr().err.splitlines()[-1]


def test_a_printed_cost_is_a_possible_budget(elastic_run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = ["tune", str(elastic_run), "--gmac", "1e-9", "--between", "0"]
    assert cli.main(refused) == 2
    words = capsys.readouterr().err.split()
    cost = words[words.index("GMAC") - 1]
    result = tuned(capsys, elastic_run, "--gmac", cost, "--between", "0")
    assert result["rows"][result["chosen"]]["kept_tokens"] == list(tiny.CHOICES[-1])


def test_the_fastest_of_equally_accurate_schedules(elastic_run: pathlib.Path) -> None:
    model = sit_jax.load(elastic_run)
    params = {**model.params, "head": jax.tree.map(jnp.zeros_like, model.params["head"])}
    model = dataclasses.replace(model, variables={**model.variables, "params": params})
    result = tune(model, Budget("gmac", 1), Runtime(seconds=0.1), model.data, between=0)
    rows = result["rows"]
    assert len({row["score"] for row in rows}) == 1
    assert rows[result["chosen"]]["latency_ms"] == min(row["latency_ms"] for row in rows)


@pytest.mark.slow
def test_other_targets(elastic_run: pathlib.Path) -> None:
    for words in (["--target", "onnxruntime"], ["--topology", "v5e:1x1", "--dtype", "bfloat16"]):
        command = [sys.executable, "-m", "sit_jax", "tune", str(elastic_run), "--latency_ms", "1e6", "--json", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows = json.loads(done.stdout)["rows"]
        assert all(0 < row["latency_ms"] < 1e4 for row in rows)
        assert all(row["score"] is not None for row in rows)


def test_a_misspelt_budget_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", "run", "--latency_mss", "5"])
    assert "--latency_mss" in capsys.readouterr().err.splitlines()[-1]


def test_redundancy_is_the_error_of_the_best_tokens(digits_dir: str) -> None:
    model = random_weights.draw(tiny.plain(image_size=48))
    data = DataConfig(data_dir=digits_dir, train_split="train[:3]", mean=(0.5,) * 3, std=(0.5,) * 3)
    curves = redundancy(model, data, 3)

    spec = InputSpec(data=data, image_size=(48, 48), channels=1, num_classes=10, eval_batch_size=3, labels=False)
    pixels = next(iter(eval_batches(spec, open_source(data, data.train_split), Hosts())))["image"]
    module: Any = build_model(model.vit).bind(random_weights.variables(model))
    _, outputs = module(normalize(jnp.asarray(pixels), data))
    rng = np.random.default_rng(0)
    for block, tokens in enumerate(np.asarray(x, np.float64) for x in outputs.tokens):
        whole = sum(np.square(x - x.mean(axis=0)).sum() for x in tokens)
        for kept in (1, 2, 4, 8, 9):
            # The best linear combinations of tokens, by the eigenvectors of their products.
            best = [np.linalg.eigh(x @ x.T)[1][:, ::-1][:, :kept] for x in tokens]
            left = sum(recovery_error(x, vectors.T) for x, vectors in zip(tokens, best, strict=True))
            assert curves[block, kept - 1] == pytest.approx(left / whole, abs=1e-5)
            for reducer in (rng.normal(size=(kept, 9)), np.eye(9)[:kept]):
                other = sum(recovery_error(x, reducer) for x in tokens)
                assert curves[block, kept - 1] <= other / whole + 1e-5


def recovery_error(x: np.ndarray, reducer: np.ndarray) -> float:
    """The squared error of tokens that are recovered by least squares from combinations of them."""
    few = reducer @ x
    return float(np.square(x - x @ np.linalg.pinv(few) @ few).sum())


def test_redundancy_of_a_bfloat16_model(digits_dir: str) -> None:
    model = random_weights.draw(tiny.plain())
    data = DataConfig(data_dir=digits_dir)
    curves = redundancy(model, data, 20)
    rounded = redundancy(dataclasses.replace(model, dtype="bfloat16"), data, 20)
    np.testing.assert_allclose(rounded, curves, atol=0.02)


def test_redundancy_is_of_all_classes(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for name, levels in (("flat", 1), ("noise", 256)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(8):
            pixels = rng.integers(levels, size=(48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{index}.png")
    model = random_weights.draw(tiny.plain(image_size=48))
    data = DataConfig(name="folder", data_dir=str(tmp_path), eval_split="train")
    some, every = redundancy(model, data, 8), redundancy(model, data, 16)
    # Half of the images of each class, which come one after the other: noise differs little from noise.
    np.testing.assert_allclose(some, every, atol=0.05)


def test_the_proposal_has_the_least_error_for_its_cost() -> None:
    arch = tiny.plain(image_size=64, depth=4)
    rng = np.random.default_rng(0)
    curves = np.sort(rng.uniform(size=(4, 16)), axis=1)[:, ::-1].copy()
    curves[:, 0], curves[:, -1] = 1.0, 0.0
    whole = count_cost(arch).gmac
    for fraction in (0.95, 0.85):
        found = propose(arch, curves, 2, fraction * whole)
        assert count_cost(found.arch).gmac <= fraction * whole
        # Every other choice of blocks and tokens at this cost has a reducer with a larger error, or the same.
        least = min(
            max(curves[block - 1, kept - 1] for block, kept in zip(after, counts, strict=True))
            for after in itertools.combinations((1, 2, 3), 2)
            for counts in itertools.product(range(1, 17), repeat=2)
            if counts[0] >= counts[1]
            and count_cost(
                dataclasses.replace(
                    arch,
                    stage_blocks=(after[0], after[1] - after[0], 4 - after[1]),
                    kept_tokens=(16, *counts),
                )
            ).gmac
            <= fraction * whole
        )
        mine = [
            curves[block - 1, kept - 1] for block, kept in zip(found.after, found.arch.kept_tokens[1:], strict=True)
        ]
        assert max(mine) <= found.error + 1e-9
        assert found.error == pytest.approx(least)
    for impossible in (0.1 * whole, whole):
        with pytest.raises(UserError, match="--gmac"):
            propose(arch, curves, 2, impossible)


def test_a_proposal_can_be_trained(
    digits_run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, page = digits_run / "teacher", tmp_path / "proposed.py"
    cost = count_cost(sit_jax.load(teacher).vit).gmac
    words = ["tune", str(teacher), "--before_training", "--gmac", str(0.97 * cost), "--reducers", "1"]
    assert cli.main([*words, "--limit", "32", "--output", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    config = from_config_dict(get_config(str(page)))
    assert config.teacher is not None
    assert config.teacher.run == str(teacher)
    arch = config.model.architecture
    assert count_cost(arch).gmac <= 0.97 * cost  # type: ignore[arg-type]
    assert make_train_spec(config, 10).rtsm is not None
    assert config.loss.token == get_config("digits").loss.token  # The weight for teachers with whole residual branches.
    assert cli.main([*words, "--limit", "32", "--output", str(page)]) == 2  # It is not overwritten.
    fewer = (*arch.token_counts[:-1], 1)  # type: ignore[union-attr]
    changed = load_config(str(page), [f"--config.model.kept_tokens={fewer}"])
    assert changed.model.architecture.token_counts == fewer  # type: ignore[union-attr]
