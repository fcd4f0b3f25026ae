"""Hand-written gradients against autodiff of the plain formulas, and the types that they work in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from sit_jax.models.convolution import halve
from sit_jax.models.layers import attend, exact_gelu
from sit_jax.models.products import Dense, project, project_columns

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


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[jax.Array]]] = {
    "project": (project, lambda x, w: jnp.einsum("abi,io->abo", x, w), [normal(0, 2, 3, 5), normal(1, 5, 4)]),
    "project_columns": (
        project_columns,
        lambda x, w: jnp.einsum("ic,io->oc", x, w),
        [normal(0, 5, 6), normal(1, 5, 4)],
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
def test_bfloat16_products_leave_gradients_in_float32(columns: bool) -> None:
    layer: Any = Dense(8, dtype=jnp.bfloat16, columns=columns)
    x = normal(0, 4, 64) if columns else normal(0, 64, 4)
    params = layer.init(KEYS[1], x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert layer.apply(params, x).dtype == jnp.bfloat16
    scale = jnp.linspace(0.5, 1.5, 512).reshape((8, 64) if columns else (64, 8))

    def loss(params: Any) -> jax.Array:
        return (layer.apply(params, x).astype(jnp.float32) * scale).sum()

    kernel = jax.grad(loss)(params)["params"]["kernel"]
    inputs, slopes = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, scale))
    expected = inputs @ slopes.T if columns else inputs.T @ slopes
    assert kernel.dtype == jnp.float32
    # Were it rounded to bfloat16 on the way, it would be off by up to 4e-3.
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-4)
