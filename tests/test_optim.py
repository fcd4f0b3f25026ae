"""AdamW against NumPy, the decay mask, and the schedules."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sit_jax.config import OptimConfig
from sit_jax.training.optim import cosine_schedule, decay_mask, make_optimizer, schedules

PARAMS: dict[str, Any] = {
    "model": {
        "class_token": jnp.ones((1, 1, 4)),
        "positions": jnp.ones((1, 5, 4)),
        "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
        "aux_head": {"kernel": jnp.ones((4, 3))},
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "slimming_0": {"scale": jnp.ones(()), "fc1": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}},
    },
    "rtsm": {"blocks_0": {"norm1": {"scale": jnp.ones(4)}, "token_mlp": {"fc1": {"kernel": jnp.ones((2, 8))}}}},
}


def test_decay_mask() -> None:
    def decayed(decay_like_original: bool) -> set[str]:
        mask = flatten_dict(decay_mask(PARAMS, decay_like_original), sep="/")
        return {name for name, decays in mask.items() if decays}

    plain = {"model/head/kernel", "model/aux_head/kernel", "model/slimming_0/fc1/kernel"}
    assert decayed(False) == plain | {"rtsm/blocks_0/token_mlp/fc1/kernel"}
    assert decayed(True) - decayed(False) == {"model/slimming_0/scale", "rtsm/blocks_0/norm1/scale"}


def test_adamw_against_numpy() -> None:
    optim = OptimConfig(lr=0.01, rtsm_lr_scale=5.0, weight_decay=0.1, clip_norm=1.0)
    optimizer = make_optimizer(optim, epochs=4, steps_per_epoch=5)
    rates = schedules(optim, 4, 5)
    rng = np.random.default_rng(0)
    params, state, update = PARAMS, optimizer.init(PARAMS), jax.jit(optimizer.update)
    paths = ["model/head/kernel", "model/norm/scale", "rtsm/blocks_0/norm1/scale"]
    mine = {path: np.array(flatten_dict(PARAMS, sep="/")[path], np.float64) for path in paths}
    first, second = ({path: np.zeros_like(mine[path]) for path in paths} for _ in range(2))
    for step in range(3):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        norm = math.sqrt(sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(grads)))
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for path in paths:
            grad = np.asarray(flatten_dict(grads, sep="/")[path], np.float64) / max(1.0, norm)
            first[path] = 0.9 * first[path] + 0.1 * grad
            second[path] = 0.999 * second[path] + 0.001 * grad**2
            move = first[path] / (1 - 0.9 ** (step + 1))
            move = move / (np.sqrt(second[path] / (1 - 0.999 ** (step + 1))) + 1e-8)
            decay = 0.1 * mine[path] if path.endswith("kernel") else 0.0
            mine[path] = mine[path] - float(rates[path.partition("/")[0]](step)) * (move + decay)
    for path in paths:
        np.testing.assert_allclose(flatten_dict(params, sep="/")[path], mine[path], rtol=1e-5)
    assert np.array_equal(params["model"]["aux_head"]["kernel"], PARAMS["model"]["aux_head"]["kernel"])


def test_warm_up_and_steps() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_epochs=2)
    rate = cosine_schedule(optim, 1.0, epochs=10, steps_per_epoch=4)
    values = [float(rate(step)) for step in range(40)]
    assert values[:8] == pytest.approx([(step + 1) / 8 for step in range(8)])
    assert values[8:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * s / 32)) for s in range(32)], rel=1e-5)
