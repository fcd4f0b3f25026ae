"""Derivatives written by hand against autodiff of the plain functions beside them, and the types that they work in."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.errors import ConfigError
from sit_jax.models.layers import Dense
from sit_jax.ops import attention as ops
from sit_jax.ops.eager_grad import with_eager_grad

KEYS = jax.random.split(jax.random.key(0), 8)


def normal(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(KEYS[key], shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("name", ops.ATTENTION)
def test_every_attention_agrees_with_jax(name: str, dtype: str, tolerance: float) -> None:
    if name == "cudnn" and ops.choose("auto", dtype, 3, 64) != "cudnn":
        pytest.skip("cuDNN's attention does not run here")
    shapes = ((2, 3, 16, 64), (2, 3, 24, 64), (2, 3, 24, 64))
    arguments = [normal(i, *shape).astype(dtype) for i, shape in enumerate(shapes)]
    result, back = jax.vjp(ops.ATTENTION[name], *arguments)

    def reference(*arguments: jax.Array) -> jax.Array:
        heads_last = (x.astype(jnp.float32).swapaxes(1, 2) for x in arguments)
        return jax.nn.dot_product_attention(*heads_last).swapaxes(1, 2)

    expected, reference_back = jax.vjp(reference, *arguments)
    grad = normal(7, *expected.shape)
    mine, theirs = (result, *back(grad.astype(dtype))), (expected, *reference_back(grad))
    for ours, exact in zip(mine, theirs, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), exact.astype(jnp.float32), atol=tolerance)


# cuDNN's attention has the bias in channels of the keys, which works with any attention.
BIASED: dict[str, Callable[..., jax.Array]] = {
    "xla": ops.attention,
    "plain": ops.plain_attention,
    "cudnn": functools.partial(ops.cudnn_attention, implementation="xla"),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_of_the_keys_is_added_to_the_scores(name: str, dtype: str, tolerance: float) -> None:
    shapes = ((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16))
    heads = [normal(i, *shape).astype(dtype) for i, shape in enumerate(shapes)]
    bias = jnp.log(jnp.arange(1.0, 19).reshape(2, 9))
    result, back = jax.vjp(BIASED[name], *heads, bias)

    def reference(*arguments: jax.Array) -> jax.Array:
        query, key, value, bias = (x.astype(jnp.float32) for x in arguments)
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.nn.dot_product_attention(query, key, value, bias=bias[:, None, None]).swapaxes(1, 2)

    expected, reference_back = jax.vjp(reference, *heads, bias)
    grad = normal(7, *expected.shape)
    mine, theirs = (result, *back(grad.astype(dtype))), (expected, *reference_back(grad))
    assert [x.dtype for x in mine] == [dtype] * 4 + ["float32"]
    for ours, exact in zip(mine, theirs, strict=True):
        scale = max(1.0, float(jnp.abs(exact).max()))
        np.testing.assert_allclose(ours.astype(jnp.float32), exact.astype(jnp.float32), atol=tolerance * scale)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = (normal(i, 1, 1, 6, 4) for i in range(3))
    result, back = jax.vjp(ops.attention, 1e4 * query, key, value)
    assert np.isfinite(result).all()
    assert all(np.isfinite(x).all() for x in back(value))


def test_attention_that_does_not_run_here_is_refused_or_replaced() -> None:
    assert ops.choose("auto", "bfloat16", 4, 64) == ops.choose("auto", "float32", 4, 64) == "xla"
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ConfigError) as caught:
            ops.choose("cudnn", dtype, 4, 64)
        assert caught.value.key == "attention"


# Sizes of 1, small and odd ones have code of their own in XLA for CPUs.
@pytest.mark.parametrize("sizes", [(64, 4, 8), (1, 4, 8), (64, 1, 8), (64, 4, 1), (9, 11, 13), (196, 48, 96)])
def test_a_bfloat16_layer_has_float32_gradients_of_its_weights(sizes: tuple[int, int, int]) -> None:
    rows, inputs, outputs = sizes
    layer: Any = Dense(outputs, dtype=jnp.bfloat16)
    x, kernel, bias = normal(0, 2, rows, inputs).astype(jnp.bfloat16), normal(2, inputs, outputs), normal(3, outputs)
    grad = normal(1, 2, rows, outputs).astype(jnp.bfloat16)

    def apply(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        result: jax.Array = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
        return result

    drawn = layer.init(KEYS[1], x)
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}
    result, back = jax.vjp(apply, x, kernel, bias)
    to_x, to_kernel, to_bias = jax.jit(back)(grad)

    def wide(array: jax.Array) -> np.ndarray:
        return np.asarray(array.astype(jnp.bfloat16), np.float64)

    # Rounded once, at the end; gradients of weights not at all: to bfloat16 they would be off by up to 4e-3.
    expected = wide(x) @ wide(kernel) + np.asarray(bias, np.float64)
    assert (result.dtype, to_x.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(wide(result), expected, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(wide(to_x), wide(grad) @ wide(kernel).T, rtol=2**-8, atol=1e-5)
    assert to_kernel.dtype == to_bias.dtype == jnp.float32
    np.testing.assert_allclose(to_kernel, np.einsum("bri,bro->io", wide(x), wide(grad)), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(to_bias, wide(grad).sum(axis=(0, 1)), rtol=1e-5, atol=1e-4)


def squared(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.square(jnp.tanh(x @ params["w"]) + params["b"][None]).mean()


ARGUMENTS = ({"w": normal(0, 5, 3), "b": normal(1, 3)}, normal(2, 4, 5))


def test_eager_gradients_are_those_of_the_function() -> None:
    eager = with_eager_grad(squared)
    assert eager(*ARGUMENTS) == squared(*ARGUMENTS)

    def total(function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
        return 3.0 * jnp.sin(function(*arguments))

    mine, theirs = (jax.grad(functools.partial(total, f), argnums=(0, 1))(*ARGUMENTS) for f in (eager, squared))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), mine, theirs)
    tangents = jax.tree.map(jnp.cos, ARGUMENTS)
    forward = [jax.jvp(function, ARGUMENTS, tangents)[1] for function in (eager, squared)]
    np.testing.assert_allclose(forward[0], forward[1], rtol=1e-5)
