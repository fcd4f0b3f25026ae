"""One student for several token schedules."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_reducers  # noqa: F401 (a module that reducers are named in)
import pytest
import tiny
from PIL import Image

import sit_jax
from sit_jax.analysis.flops import count_step_macs
from sit_jax.analysis.summary import summarize
from sit_jax.analysis.tune import Budget, Runtime, tune
from sit_jax.config import Config, LossConfig, ModelConfig
from sit_jax.errors import ConfigError, PreemptedError
from sit_jax.io.runs import read_config
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.cut import cut_params, cut_rtsm
from sit_jax.parallel import sharding
from sit_jax.report.load_run import read_run
from sit_jax.training.elastic import drawn_schedules
from sit_jax.training.evaluate import evaluate_model
from sit_jax.training.loop import Extensions, run
from sit_jax.training.metrics import evaluations, read_metrics
from sit_jax.training.step import LossInputs, init_state, make_train_spec, make_train_step

CHOICES = tiny.CHOICES
ELASTIC = dataclasses.replace(tiny.SLIMMED, keep_ratio=None, kept_tokens_choices=CHOICES)


def config(arch: Architecture = ELASTIC, **changes: Any) -> Config:
    return tiny.small(student=arch, **changes)


def test_schedules_are_drawn_by_seed_and_step() -> None:
    drawn = [drawn_schedules(config(), step) for step in range(300)]
    assert drawn == [drawn_schedules(config(), step) for step in range(300)]
    assert drawn != [drawn_schedules(config(seed=1), step) for step in range(300)]
    counts = [drawn.count((choice,)) for choice in CHOICES]
    assert sum(counts) == 300
    assert min(counts) > 70
    four = dataclasses.replace(ELASTIC, kept_tokens=(), kept_tokens_choices=((4, 4), *CHOICES))
    sandwiches = {drawn_schedules(config(four, elastic_rule="sandwich"), step) for step in range(50)}
    assert sandwiches == {((4, 4), between, (4, 1)) for between in ((4, 3), (4, 2))}
    assert drawn_schedules(tiny.small(), 0) == ()


def states(made: Config) -> tuple[Any, Any, Any, Any]:
    """A spec, mesh, state and teacher, the same for every schedule."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    spec = make_train_spec(made, steps_per_epoch=10)
    # Plain gradient descent, whose update shows the gradient.
    spec = spec._replace(optimizer=optax.sgd(0.1))
    whole = init_state(make_train_spec(config(), 10)._replace(optimizer=optax.sgd(0.1)), mesh)
    teacher = {"params": whole.params["model"], "batch_stats": whole.batch_stats}
    teacher = jax.tree.map(lambda x: x + 0.1, teacher)
    return spec, mesh, whole, {"teacher": teacher}


def test_a_step_trains_the_cut_model() -> None:
    kept = (4, 2)
    spec, mesh, state, teachers = states(config())
    model, rtsm = state.params["model"], state.params["rtsm"]
    alone = dataclasses.replace(tiny.SLIMMED, keep_ratio=None, kept_tokens=kept)
    cut = {"model": cut_params(ELASTIC, model, kept), "rtsm": cut_rtsm(ELASTIC, rtsm, kept)}
    alone_spec, *_ = states(config(alone))
    before = jax.tree.map(np.array, state.params)
    small = state.replace(params=cut, opt_state=alone_spec.optimizer.init(cut))
    small = jax.tree.map(jnp.array, small)  # Steps donate the state.
    expected, theirs = make_train_step(alone_spec, mesh)(small, tiny.batch(8), teachers)
    after, mine = make_train_step(spec, mesh, (kept,))(state, tiny.batch(8), teachers)
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        {
            "model": cut_params(ELASTIC, after.params["model"], kept),
            "rtsm": cut_rtsm(ELASTIC, after.params["rtsm"], kept),
        },
        expected.params,
    )
    # What the cut model does not have gets no gradient.
    for place in (("model", "slimming_0", "fc2"), ("rtsm", "blocks_0", "token_mlp", "fc1")):
        old, new = before, after.params
        for name in place:
            old, new = old[name], new[name]
        rest = np.s_[:, 2:] if place[0] == "model" else np.s_[2:]
        np.testing.assert_array_equal(old["kernel"][rest], new["kernel"][rest])


def test_a_sandwich_is_the_mean_of_its_schedules() -> None:
    spec, mesh, state, teachers = states(config(elastic_rule="sandwich"))
    first = jax.tree.map(np.array, state)
    updates, flops = [], []
    for schedules in (CHOICES, *((choice,) for choice in CHOICES)):
        step: Any = make_train_step(spec, mesh, schedules)
        lowered = step.lower(first, tiny.batch(8), teachers)
        flops.append(lowered.cost_analysis()["flops"])
        after, metrics = lowered.compile()(jax.tree.map(jnp.array, first), tiny.batch(8), teachers)
        updates.append((jax.tree.map(lambda a, b: a - b, after.params, first.params), float(metrics["loss"])))
    (sandwich, loss), *each = updates
    assert loss == pytest.approx(np.mean([x for _, x in each]), rel=1e-5)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *(x for x, _ in each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), sandwich, mean)
    # The teacher runs once for all of them.
    teacher = build_model(tiny.TWO_BLOCKS)
    pass_of_teacher: Any = jax.jit(teacher.apply).lower(teachers["teacher"], tiny.batch(8)["image"])
    together, *alone = flops
    saved = sum(alone) - together
    assert saved == pytest.approx(2 * pass_of_teacher.cost_analysis()["flops"], rel=0.1)
    assert count_step_macs(config(elastic_rule="sandwich")) > 2 * count_step_macs(config())


def test_every_schedule_is_evaluated(elastic_run: pathlib.Path) -> None:
    folder = elastic_run
    last = evaluations(read_metrics(folder))[-1]
    for kept in CHOICES:
        model = sit_jax.load(folder, kept_tokens=kept)
        expected = evaluate_model(model)["top1"]
        assert last["top1" if kept == CHOICES[0] else f"top1/{kept[1]}"] == pytest.approx(expected)
    arch = sit_jax.load(folder).vit
    assert arch.kept_tokens_choices == CHOICES
    summary = summarize(folder)
    rows = read_run(folder).schedules
    with Image.open(folder / "curves.png") as image:
        assert image.width == 2 * 6 * 110  # Teacher and student, and no cut model.
    assert [entry["kept_tokens"] for entry in summary["schedules"]] == [list(kept) for kept in CHOICES]
    assert [row["tokens"] for row in rows] == ["4/3", "4/2", "4/1"]
    for kept, entry, row in zip(CHOICES, summary["schedules"], rows, strict=True):
        assert row["top1"] == entry["top1"] == last["top1" if kept == CHOICES[0] else f"top1/{kept[1]}"]
        assert row["images_per_s"] == entry["images_per_s"]


def test_resuming_draws_the_same_schedules(elastic_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made, whole = read_config(elastic_run), elastic_run

    def stop(step: int, kind: str, values: dict[str, float]) -> None:
        if step == 15:
            raise PreemptedError("stopped")

    assert made.teacher is not None
    made = dataclasses.replace(made, teacher=dataclasses.replace(made.teacher, run=str(whole / "teacher")))
    for extensions in (Extensions(callbacks=[stop]), Extensions()):
        if extensions.callbacks:
            with pytest.raises(PreemptedError):
                run(made, tmp_path, extensions=extensions)
        else:
            run(made, tmp_path, resume=True)
    mine, theirs = sit_jax.load(tmp_path), sit_jax.load(whole)
    jax.tree.map(np.testing.assert_array_equal, mine.variables, theirs.variables)


def test_a_sandwich_without_labels(digits_config: Config, digits_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    choices = ((4, 4), *CHOICES)
    traced = []

    def count(given: LossInputs) -> jax.Array:
        traced.append(given.outputs.tokens[-1].shape[1])
        return jnp.zeros(())

    assert digits_config.teacher is not None
    made = dataclasses.replace(
        digits_config,
        model=ModelConfig(architecture=dataclasses.replace(tiny.SLIMMED, keep_ratio=None, kept_tokens_choices=choices)),
        teacher=dataclasses.replace(digits_config.teacher, run=str(digits_run / "teacher")),
        elastic_rule="sandwich",
        loss=LossConfig(classification=0.0, token=0.5, feature=1.0, extra={"count": 0.0}),
        optim=dataclasses.replace(digits_config.optim, accumulate_steps=2),
        epochs=1,
    )
    run(made, tmp_path, extensions=Extensions(losses={"count": count}))
    # Two sets of schedules, with 3 or 2 tokens in the middle, are compiled once each.
    assert sorted(traced) == [1, 1, 2, 3, 4, 4]
    last = evaluations(read_metrics(tmp_path))[-1]
    model = sit_jax.load(tmp_path)
    result = tune(model, Budget("gmac", 1.0), Runtime(seconds=0.1), model.data, 0, model.is_labelled())
    assert result["score"] == "cosine"
    stored = summarize(tmp_path)["schedules"]
    for key, row, entry in zip(("cosine", "cosine/3", "cosine/2", "cosine/1"), result["rows"], stored, strict=True):
        assert last[key] == pytest.approx(row["score"], abs=1e-5)
        assert entry["cosine"] == pytest.approx(row["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kept_tokens_choices": ((4, 3),)}, "kept_tokens_choices"),
        ({"kept_tokens_choices": ((4, 2), (4, 2))}, "kept_tokens_choices"),
        ({"kept_tokens_choices": ((4, 2), (4, 3))}, "kept_tokens_choices"),
        ({"kept_tokens_choices": ((4, 3), (4, 1), (4, 2))}, "kept_tokens_choices"),
        ({"kept_tokens_choices": ((4, 2), (4, 0))}, "kept_tokens_choices"),
        ({"kept_tokens_choices": ((4, 2), (3, 1))}, "kept_tokens_choices"),
        ({"kept_tokens_choices": ((4, 2), (4,))}, "kept_tokens_choices"),
        ({"kept_tokens": (4, 2)}, "kept_tokens"),
        ({"stage_blocks": (), "kept_tokens": ()}, "kept_tokens_choices"),
    ],
)
def test_choices_that_are_wrong(changes: dict[str, Any], key: str) -> None:
    values = {"kept_tokens": (), **changes}
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(ELASTIC, **values)
    assert error.value.key == key


def test_elastic_training_that_is_not_possible() -> None:
    own = dataclasses.replace(ELASTIC, reducer="own_reducers:Weighted")
    with pytest.raises(ConfigError, match=r"model\.kept_tokens_choices"):
        make_train_spec(config(own), 10)
    with pytest.raises(ValueError, match="elastic_rule"):
        tiny.small(elastic_rule="sandwich")
