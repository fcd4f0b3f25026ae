"""Everything that changes from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """The training state, a pytree.

    Attributes:
        step: Optimizer steps done, int32 scalar.
        params: `{'model': ..., 'reverse': ...}`, float32; `reverse` is missing where nothing is recovered.
        batch_stats: BatchNorm's running statistics; an empty dict without BatchNorm.
        opt_state: The optimizer's.
        ema: `{'params': ..., 'batch_stats': ...}`, the moving average of the model; None where switched off.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any
    ema: dict[str, Any] | None

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables, as `apply` takes them."""
        return {"params": self.params["model"], "batch_stats": self.batch_stats}


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def has_finite_weights(state: TrainState) -> bool:
    """Whether all weights, statistics and averages are finite; the same answer in all processes."""
    return bool(_all_finite((state.params, state.batch_stats, state.ema)))


def update_ema(ema: Any, new: Any, decay: float, step: jax.Array) -> Any:
    """Moves the average towards the new weights; the first steps use a smaller decay, so that the average does not
    remember its start for long (`min(decay, (1 + step) / (10 + step))`, as TensorFlow's and timm's do)."""
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, fresh: old * rate + fresh * (1.0 - rate), ema, new)
