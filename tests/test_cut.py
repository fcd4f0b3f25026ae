"""Slimmed models cut to fewer tokens: the first tokens of the whole model, with nothing trained anew."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import tiny

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.errors import ConfigError
from sit_jax.models import build_model
from sit_jax.models.cut import cut_rtsm
from sit_jax.models.reducers.base import Reduced
from sit_jax.models.reducers.slim import TokenSlimming
from sit_jax.models.reverse import ReverseTokenSlimming

STUDENT = tiny.plain(image_size=64, stage_blocks=(1, 1, 2), keep_ratio=0.5)


@pytest.mark.parametrize("counts", [(6, 2), (1, 1)])
def test_fewer_tokens_are_the_same_tokens(counts: tuple[int, ...]) -> None:
    # The reference is the whole model, whose modules' tokens are thrown away as they come out.
    weights = random_weights.draw(STUDENT)
    variables = random_weights.variables(weights)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 64, 1)).astype(np.float32))
    left = iter(counts)

    def first(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if isinstance(context.module, TokenSlimming) and context.method_name == "__call__":
            count = next(left)
            return Reduced(result.tokens[:, :count], result.mass[:, :count], result.assignment[:, :, :count])
        return result

    with nn.intercept_methods(first):
        expected = build_model(STUDENT).bind(variables)(images)
    cut = weights.cut((16, *counts))
    logits, outputs = build_model(cut.vit).bind(random_weights.variables(cut))(images)
    np.testing.assert_allclose(logits, expected[0], rtol=1e-5, atol=1e-6)
    assert [assignment.shape[2] for assignment in outputs.assignments] == list(counts)
    for mine, theirs in zip(outputs.assignments, expected[1].assignments, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    assert jax.tree.map(jnp.shape, weights.params["slimming_0"]["fc2"])["kernel"][1] == 8  # The trained ones stay.


def test_reverse_modules_take_the_first_tokens() -> None:
    weights = random_weights.draw(STUDENT, rtsm=True)
    rtsm = jax.tree.map(jnp.asarray, weights.rtsm["blocks_1"])  # Recovers 16 tokens from 4.
    # Without this bias, a token of zeros is zero after the LayerNorm, and adds nothing to the sum over the tokens.
    rtsm["norm1"]["bias"] = jnp.zeros(16)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32))
    module = ReverseTokenSlimming(16)
    expected: Any = module.apply({"params": rtsm}, jnp.pad(tokens, ((0, 0), (0, 1), (0, 0))))
    cut = cut_rtsm(STUDENT, {"blocks_1": rtsm}, (16, 8, 3))["blocks_1"]
    found: Any = module.apply({"params": cut}, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reducer", ["topk", "evit", "tome"])
def test_reducers_without_parameters_take_another_number(reducer: str) -> None:
    teacher = random_weights.draw(STUDENT.without_slimming())
    pixels = random_weights.pixels(STUDENT)
    cut = sit_jax.slim(teacher, reducer=reducer, after=(1, 2), kept_tokens=(16, 12, 8)).cut((16, 9, 3))
    expected = sit_jax.slim(teacher, reducer=reducer, after=(1, 2), kept_tokens=(16, 9, 3))
    assert cut.arch == expected.arch
    np.testing.assert_array_equal(cut(pixels), expected(pixels))


@pytest.mark.parametrize("kept", [(16, 9, 2), (16, 8), (15, 8, 4), (16, 2, 4), (16, 8, 0)])
def test_schedules_that_do_not_fit(kept: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        random_weights.draw(STUDENT).cut(kept)
    assert error.value.key == "kept_tokens"


def test_models_that_cannot_be_cut() -> None:
    own = dataclasses.replace(STUDENT, reducer="own_reducers:Weighted")
    for arch, kept in ((own, (16, 6, 2)), (STUDENT.without_slimming(), (16,))):
        with pytest.raises(ConfigError) as error:
            random_weights.draw(arch).cut(kept)
        assert error.value.key == "kept_tokens"


def test_commands_cut(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = random_weights.draw(STUDENT, rtsm=True)
    weights.save(tmp_path / "whole", with_rtsm=True)
    words = ["export", str(tmp_path / "whole"), str(tmp_path / "cut"), "--format", "folder", "--with_rtsm"]
    assert cli.main([*words, "--kept_tokens", "16,6,2"]) == 0
    opened = sit_jax.load(tmp_path / "cut", with_rtsm=True)
    assert opened.vit.token_counts == (16, 6, 2)
    pixels = random_weights.pixels(STUDENT)
    np.testing.assert_array_equal(opened(pixels), sit_jax.load(tmp_path / "whole", kept_tokens=(16, 6, 2))(pixels))
    # The file has the cut weights only.
    assert opened.params["slimming_1"]["fc2"]["kernel"].shape == (8, 2)
    assert opened.rtsm["blocks_0"]["token_mlp"]["fc1"]["kernel"].shape[0] == 6
    assert cli.main([*words, "--kept_tokens", "16,9,2"]) == 2
    assert "kept_tokens" in capsys.readouterr().err
