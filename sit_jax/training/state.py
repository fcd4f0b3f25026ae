"""The training state."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from sit_jax.models.trees import Params, Variables


@flax.struct.dataclass
class TrainState:
    """The training state, a pytree with everything that changes from step to step.

    Attributes:
        step: Number of optimizer steps done, int32 scalar.
        params: `{'model': ..., 'rtsm': ...}`, float32; `rtsm` is absent if no tokens are recovered.
        batch_stats: BatchNorm's running statistics; an empty dict without BatchNorm.
        ema: The moving average of the model's variables; None if disabled.
    """

    step: jax.Array
    params: Params
    batch_stats: Params
    opt_state: optax.OptState
    ema: Variables | None

    @property
    def variables(self) -> Variables:
        """Variables of the model, as `apply` takes them."""
        return {"params": self.params["model"], "batch_stats": self.batch_stats}


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def has_finite_weights(state: TrainState) -> bool:
    """Returns whether all weights, statistics and averages are finite; the same result in all processes."""
    return bool(_all_finite((state.params, state.batch_stats, state.ema)))


def update_ema(ema: Variables, new: Variables, decay: float, step: jax.Array) -> Variables:
    """Updates the moving average towards the new weights.

    The first steps use a smaller decay, `min(decay, (1 + step) / (10 + step))`, so that the initial weights lose their
    influence quickly, as in TensorFlow and timm.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, fresh: old * rate + fresh * (1.0 - rate), ema, new)
