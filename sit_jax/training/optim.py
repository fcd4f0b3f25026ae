"""AdamW with one schedule per parameter group, and the learning-rate schedules."""

import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_map_with_path
from jax.typing import ArrayLike
from jaxtyping import PyTree

from sit_jax.config import OptimConfig
from sit_jax.models.trees import Params, path_names


def cosine_schedule(optim: OptimConfig, peak: float, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: linear warm-up, cosine decay to the minimum, then constant.

    `epochs` is the number of epochs from the first step to the end of the cosine, including the warm-up.
    """

    def schedule(count: ArrayLike) -> jax.Array:
        step = jnp.asarray(count)
        epoch = step // steps_per_epoch if optim.schedule_per == "epoch" else step / steps_per_epoch
        progress = jnp.clip((epoch - optim.warmup_epochs) / (epochs - optim.warmup_epochs), 0.0, 1.0)
        rate = optim.min_lr + (peak - optim.min_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        if optim.warmup_epochs > 0:
            # The first step uses a rate above 0; a rate of 0 would waste the step.
            since_start = (epoch + 1) if optim.schedule_per == "epoch" else (step + 1) / steps_per_epoch
            rate = jnp.where(
                epoch < optim.warmup_epochs, peak * jnp.minimum(1.0, since_start / optim.warmup_epochs), rate
            )
        return rate

    return schedule


def schedules(optim: OptimConfig, epochs: int, steps_per_epoch: int) -> dict[str, optax.Schedule]:
    """Returns the schedule of each parameter group: `model`, and `rtsm` with its own peak and the same minimum."""
    return {
        "model": cosine_schedule(optim, optim.lr, epochs, steps_per_epoch),
        "rtsm": cosine_schedule(optim, optim.lr * optim.rtsm_lr_scale, epochs, steps_per_epoch),
    }


def make_optimizer(
    optim: OptimConfig, epochs: int, steps_per_epoch: int, train_aux_head: bool = False
) -> optax.GradientTransformation:
    """Returns AdamW over the parameters `{'model': ..., 'rtsm': ...}`.

    As in the original, the auxiliary head is frozen, unless `train_aux_head`: in most runs, no loss reads it.
    """
    steps = {
        group: optax.scale_by_learning_rate(rate) for group, rate in schedules(optim, epochs, steps_per_epoch).items()
    }

    def group(path: tuple[Hashable, ...], _: object) -> str:
        names = path_names(path)
        return "frozen" if "aux_head" in names and not train_aux_head else names[0]

    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm > 0 else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, lambda params: decay_mask(params, optim.decay_like_original)),
        optax.partition({**steps, "frozen": optax.set_to_zero()}, functools.partial(tree_map_with_path, group)),
    )


def decay_mask(params: Params, decay_like_original: bool = False) -> PyTree[bool]:
    """Returns True for the parameters that weight decay applies to.

    Norms, biases, class and distillation tokens, positions and the slimming scale are not decayed. The original also
    decays the slimming scale and everything in the reverse modules, as does `decay_like_original`.
    """

    def decays(path: tuple[Hashable, ...], leaf: jax.Array) -> bool:
        names = path_names(path)
        if decay_like_original and (names[0] == "rtsm" or (names[-1] == "scale" and names[-2].startswith("slimming_"))):
            return True
        tokens = ("class_token", "positions", "distillation_token", "distillation_position")
        return leaf.ndim > 1 and names[-1] not in tokens

    return tree_map_with_path(decays, params)
