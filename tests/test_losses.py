"""The loss terms against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from sit_jax import losses
from sit_jax.data.mixing import soft_labels

RNG = np.random.default_rng(0)
LOGITS, TEACHER = RNG.normal(size=(2, 6, 5)).astype(np.float32) * 3
LABELS = np.array([0, 4, 2, 2, 1, 3], np.int32)


def test_soft_target_cross_entropy() -> None:
    soft = softmax(RNG.normal(size=(6, 5)), axis=1).astype(np.float32)
    expected = -(soft * log_softmax(LOGITS, axis=1)).sum(axis=1).mean()
    assert losses.soft_target_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(soft)) == pytest.approx(expected, rel=1e-5)


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


def test_hard_distillation_takes_the_likeliest_class() -> None:
    expected = -log_softmax(LOGITS, axis=1)[np.arange(6), TEACHER.argmax(axis=1)].mean()
    assert losses.hard_distillation(jnp.asarray(LOGITS), jnp.asarray(TEACHER)) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        losses.label_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS)),
        -log_softmax(LOGITS, axis=1)[np.arange(6), LABELS],
        rtol=1e-5,
    )


def test_label_smoothing() -> None:
    soft = np.asarray(soft_labels(jnp.asarray(LABELS), 5, 0.1))
    assert soft[0] == pytest.approx([0.92, 0.02, 0.02, 0.02, 0.02])
    np.testing.assert_allclose(soft.sum(axis=1), 1.0, rtol=1e-6)
