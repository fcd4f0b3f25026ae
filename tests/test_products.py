"""Hand-written gradients against autodiff of the plain formulas, and the types that they work in."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from sit_jax.models.convolution import halve
from sit_jax.models.gelu import exact_gelu
from sit_jax.models.layers import attend, normalise
from sit_jax.models.products import Dense, gelu_mlp, linear

KEYS = jax.random.split(jax.random.key(0), 8)


def normal(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(KEYS[key], shape)


def plain_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), value)


def plain_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [padded[:, i:, j:][:, : x.shape[1] : 2, : x.shape[2] : 2] for i in range(3) for j in range(3)]
    return jnp.einsum("tbhwi,tio->bhwo", jnp.stack(parts), kernel.reshape(9, *kernel.shape[2:]))


def plain_mlp(x: jax.Array, w1: jax.Array, b1: jax.Array, w2: jax.Array, b2: jax.Array) -> jax.Array:
    hidden = jnp.einsum("...i,ih->...h", x, w1) + jnp.expand_dims(b1, range(x.ndim - 1))
    return jnp.einsum("...h,ho->...o", jax.nn.gelu(hidden, approximate=False), w2) + jnp.expand_dims(
        b2, range(x.ndim - 1)
    )


def plain_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-3) * scale[None, None] + bias[None, None]


MLP_WEIGHTS = [normal(1, 5, 6), normal(2, 6), normal(3, 6, 4), normal(4, 4)]

CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[jax.Array]]] = {
    "linear": (
        functools.partial(linear, False),
        lambda x, w, b: jnp.einsum("abi,io->abo", x, w) + b[None, None],
        [normal(0, 2, 3, 5), normal(1, 5, 4), normal(2, 4)],
    ),
    "linear, no bias": (
        lambda x, w: linear(False, x, w, None),
        lambda x, w: jnp.einsum("abi,io->abo", x, w),
        [normal(0, 2, 3, 5), normal(1, 5, 4)],
    ),
    "linear, columns": (
        functools.partial(linear, True),
        lambda x, w, b: jnp.einsum("ic,io->oc", x, w) + b[:, None],
        [normal(0, 5, 6), normal(1, 5, 4), normal(2, 4)],
    ),
    "mlp": (functools.partial(gelu_mlp, False), plain_mlp, [normal(0, 2, 3, 5), *MLP_WEIGHTS]),
    "mlp, columns": (
        functools.partial(gelu_mlp, True),
        lambda x, *weights: plain_mlp(x.T, *weights).T,
        [normal(0, 5, 7), *MLP_WEIGHTS],
    ),
    "norm": (
        functools.partial(normalise, 1e-3, jnp.float32),
        plain_norm,
        [3 + 2 * normal(0, 2, 3, 5), normal(1, 5), normal(2, 5)],
    ),
    "halve": (halve, plain_convolution, [normal(0, 2, 8, 6, 3), normal(1, 3, 3, 3, 4)]),
    "gelu": (exact_gelu, lambda x: jax.nn.gelu(x, approximate=False), [5 * normal(0, 40, 50)]),
    "attend": (attend, plain_attention, [2 * normal(i, 2, 3, 7, 4) for i in range(3)]),
    "attend, other keys": (
        attend,
        plain_attention,
        [normal(0, 2, 3, 7, 4), normal(1, 2, 3, 5, 4), normal(2, 2, 3, 5, 4)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autodiff(name: str) -> None:
    mine, plain, arguments = CASES[name]
    with jax.default_matmul_precision("highest"):
        result, back = jax.vjp(mine, *arguments)
        expected, plain_back = jax.vjp(plain, *arguments)
        np.testing.assert_allclose(result, expected, atol=2e-6)
        gradient = normal(7, *expected.shape)
        for ours, theirs in zip(back(gradient), plain_back(gradient), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
            assert np.abs(theirs).max() > 0.1


def test_large_scores_do_not_overflow() -> None:
    query, key, value = (normal(i, 1, 1, 6, 4) for i in range(3))
    result, back = jax.vjp(attend, 1e4 * query, key, value)
    assert np.isfinite(result).all()
    assert all(np.isfinite(x).all() for x in back(value))


def test_gelu_to_float32s_precision() -> None:
    x = np.linspace(-12, 12, 4801, dtype=np.float32)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(exact_gelu(jnp.asarray(x)), wide * 0.5 * (1 + erf(wide / np.sqrt(2))), rtol=0, atol=1e-6)
    half = exact_gelu(jnp.asarray(x, jnp.bfloat16))
    exact = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    exact = exact * 0.5 * (1 + erf(exact / np.sqrt(2)))
    # Rounded once, at the end.
    np.testing.assert_allclose(np.asarray(half, np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("columns", [False, True])
# XLA for CPUs treats sizes of 1, small and odd ones by themselves, and not all of bfloat16's products are to be had.
@pytest.mark.parametrize("sizes", [(64, 4, 8), (1, 4, 8), (64, 1, 8), (64, 4, 1), (9, 11, 13), (196, 48, 96)])
def test_bfloat16_products_leave_gradients_in_float32(sizes: tuple[int, int, int], columns: bool) -> None:
    rows, inputs, outputs = sizes
    x = normal(0, inputs, rows) if columns else normal(0, rows, inputs)
    x, slopes = x.astype(jnp.bfloat16), normal(1, *((outputs, rows) if columns else (rows, outputs)))
    kernel, bias = normal(2, inputs, outputs), normal(3, outputs)
    result, back = jax.jit(functools.partial(jax.vjp, functools.partial(linear, columns)))(x, kernel, bias)
    assert result.dtype == jnp.bfloat16
    to_x, to_kernel, to_bias = jax.jit(back)(slopes.astype(jnp.bfloat16))

    def wide(array: jax.Array) -> np.ndarray:
        exact = np.asarray(array.astype(jnp.bfloat16), np.float64)
        return exact.T if columns and array.ndim == 2 and array is not kernel else exact

    expected = wide(x) @ wide(kernel) + np.asarray(bias, np.float64)
    # Rounded once, at the end; gradients of weights not at all: to bfloat16 they would be off by up to 4e-3.
    np.testing.assert_allclose(wide(result), expected, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(wide(to_x), wide(slopes) @ wide(kernel).T, rtol=2**-8, atol=1e-5)
    assert to_kernel.dtype == to_bias.dtype == jnp.float32
    np.testing.assert_allclose(to_kernel, wide(x).T @ wide(slopes), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(to_bias, wide(slopes).sum(axis=0), rtol=1e-5, atol=1e-4)


def test_a_bfloat16_convolutions_kernel_gradient_is_summed_in_float32() -> None:
    x, kernel = normal(0, 2, 8, 6, 16).astype(jnp.bfloat16), normal(1, 3, 3, 16, 32)
    slopes = normal(2, 2, 4, 3, 32).astype(jnp.bfloat16)
    _, back = jax.jit(functools.partial(jax.vjp, halve))(x, kernel)
    to_kernel = jax.jit(back)(slopes)[1]
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + 8 : 2, j : j + 6 : 2] for i in range(3) for j in range(3)]
    expected = np.einsum("tbhwi,bhwo->tio", np.stack(windows), np.asarray(slopes, np.float64))
    assert to_kernel.dtype == jnp.float32
    np.testing.assert_allclose(to_kernel, expected.reshape(3, 3, 16, 32), rtol=1e-5, atol=1e-4)


def test_parameters_stay_in_float32() -> None:
    layer: Any = Dense(8, dtype=jnp.bfloat16)
    params = layer.init(KEYS[1], normal(0, 64, 4))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert layer.apply(params, normal(0, 64, 4)).dtype == jnp.bfloat16


def test_an_mlp_keeps_one_array_of_its_hidden_size_and_that_in_half_precision() -> None:
    x = normal(0, 3, 8, 16).astype(jnp.bfloat16)
    weights = [normal(1, 16, 64), normal(2, 64), normal(3, 64, 16), normal(4, 16)]
    _, back = jax.vjp(functools.partial(gelu_mlp, False), x, *weights)
    hidden = [leaf for leaf in jax.tree.leaves(back) if leaf.size == 3 * 8 * 64]
    assert [leaf.dtype for leaf in hidden] == [jnp.bfloat16]


def test_norm_to_float32s_precision_on_large_means() -> None:
    x = 1000 + normal(0, 4, 64)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(axis=-1, keepdims=True)) / wide.std(axis=-1, keepdims=True)
    result = normalise(0.0, jnp.float32, x, jnp.ones(64), jnp.zeros(64))
    np.testing.assert_allclose(result, expected, atol=2e-4)
