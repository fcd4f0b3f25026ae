"""Loss terms against NumPy, in what the golden values do not have: temperatures, and blocks of unequal errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from sit_jax import losses
from sit_jax.data.mixing import soft_labels

RNG = np.random.default_rng(0)
LOGITS, TEACHER = RNG.normal(size=(2, 6, 5)).astype(np.float32) * 3
LABELS = np.array([0, 4, 2, 2, 1, 3], np.int32)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_logits_distillation(tau: float) -> None:
    p = softmax(TEACHER / tau, axis=1)
    divergence = (p * (np.log(p) - log_softmax(LOGITS / tau, axis=1))).sum() / len(p)
    assert losses.logits_distillation(jnp.asarray(LOGITS), jnp.asarray(TEACHER), tau) == pytest.approx(
        tau**2 * divergence, rel=1e-4
    )
    assert losses.logits_distillation(jnp.asarray(TEACHER), jnp.asarray(TEACHER), tau) == pytest.approx(0.0, abs=1e-5)


def test_token_distillation_averages_blocks_not_elements() -> None:
    mine, theirs = ([jnp.asarray(x) for x in RNG.normal(size=(3, 2, 3, 4)).astype(np.float32)] for _ in range(2))
    expected = np.mean([((a - b) ** 2).mean() for a, b in zip(mine, theirs, strict=True)])
    assert losses.token_distillation(mine, theirs) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="zip"):
        losses.token_distillation(mine, theirs[:2])


def test_feature_errors() -> None:
    mine, theirs = RNG.normal(size=(2, 6, 8)).astype(np.float32)
    similarity = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
    assert losses.cosine_error(jnp.asarray(mine), jnp.asarray(theirs)) == pytest.approx(1 - similarity.mean(), rel=1e-5)
    assert losses.cosine_error(jnp.asarray(mine), jnp.asarray(3 * mine)) == pytest.approx(0, abs=1e-6)
    square = losses.mean_squared_error(jnp.asarray(mine), jnp.asarray(theirs))
    assert square == pytest.approx(((mine - theirs) ** 2).mean(), rel=1e-5)
    assert np.isfinite(jax.grad(losses.cosine_error)(jnp.zeros((6, 8)), jnp.asarray(theirs))).all()


def test_no_label_is_no_error() -> None:
    soft = soft_labels(jnp.asarray([-1, 2]), 5, 0.1)
    assert soft.sum(axis=1).tolist() == pytest.approx([0, 1])
    both, one = (float(losses.soft_target_cross_entropy(jnp.asarray(LOGITS[i:2]), soft[i:])) for i in (0, 1))
    assert 2 * both == pytest.approx(one, rel=1e-6)


def test_label_smoothing() -> None:
    soft = np.asarray(soft_labels(jnp.asarray(LABELS), 5, 0.1))
    assert soft[0] == pytest.approx([0.92, 0.02, 0.02, 0.02, 0.02])
    np.testing.assert_allclose(soft.sum(axis=1), 1.0, rtol=1e-6)
