"""Loss terms against NumPy, in what the golden values do not have: temperatures, and blocks of unequal errors."""

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


def test_label_smoothing() -> None:
    soft = np.asarray(soft_labels(jnp.asarray(LABELS), 5, 0.1))
    assert soft[0] == pytest.approx([0.92, 0.02, 0.02, 0.02, 0.02])
    np.testing.assert_allclose(soft.sum(axis=1), 1.0, rtol=1e-6)
