"""Checkpoints through Orbax: written in the background, whole or not at all, read onto any mesh."""

import pathlib
import time
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sit_jax import distributed
from sit_jax.config import CheckpointConfig
from sit_jax.errors import RunError
from sit_jax.state import TrainState

FOLDER = "checkpoints"
BEST_BY = "top1"

_keep = ocp.training.preservation_policies
_when = ocp.training.save_decision_policies


class Checkpoints:
    """The checkpoints of one run: the newest ones and the best by evaluation accuracy.

    Each holds `model` (parameters and BatchNorm statistics), `ema` where there is one, and `training` (everything
    else), apart from one another so that a model can be read without its optimizer.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 1) -> None:
        """Opens the checkpoints of a run's folder.

        Args:
            workdir: The run's folder.
            keep: The newest checkpoints that stay.
        """
        best = _keep.BestN(
            get_metric_fn=lambda metrics: metrics.get(BEST_BY, -1.0), n=1, keep_checkpoints_without_metrics=False
        )
        self._checkpointer = ocp.training.Checkpointer(
            (workdir / FOLDER).absolute(),
            save_decision_policy=_when.FixedIntervalPolicy(1),
            preservation_policy=_keep.AnyPreservationPolicy([_keep.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the best accuracy, or None; the earliest of equals."""
        scored = [(c.metrics[BEST_BY], -c.step) for c in self._checkpointer.checkpoints if c.metrics]
        return -max(scored)[1] if scored else None

    def save(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Starts writing the state; the arrays may be donated right after."""
        step = int(state.step)
        if self.latest_step is None or step > self.latest_step:
            self._checkpointer.save_checkpointables_async(step, _parts(state), metrics=metrics)

    def restore(self, abstract: TrainState) -> TrainState:
        """Reads the newest checkpoint.

        Args:
            abstract: Shapes, types and shardings of the state (`jax.ShapeDtypeStruct`s with shardings).

        Raises:
            RunError: The checkpoint is of another model.
        """
        step = self.latest_step
        assert step is not None, "there is no checkpoint"
        parts = _parts(abstract)
        try:
            loaded = self._checkpointer.load_checkpointables(step, parts)
        except (ValueError, KeyError) as error:
            raise RunError(
                f"checkpoint {step} in {self._checkpointer.directory} is of another model: {_first_line(error)}"
            ) from None
        training = loaded["training"]
        params = {"model": loaded["model"]["params"], **training["params"]}
        return TrainState(
            step=training["step"],
            params=params,
            batch_stats=loaded["model"]["batch_stats"],
            opt_state=training["opt_state"],
            ema=loaded.get("ema"),
        )

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


class Due:
    """Decides when the next checkpoint is due."""

    def __init__(self, config: CheckpointConfig, steps_per_epoch: int, check_every: int) -> None:
        """Starts the clock.

        Args:
            config: What was asked for.
            steps_per_epoch: Steps in an epoch.
            check_every: Steps between two looks at process 0's clock.
        """
        self._config, self._epoch, self._check_every = config, steps_per_epoch, check_every
        self._saved_at = time.monotonic()

    def now(self, step: int) -> bool:
        """Whether to save after this step; the same answer in all processes."""
        config = self._config
        epoch, rest = divmod(step, self._epoch)
        by_epoch = config.every_epochs > 0 and rest == 0 and epoch % config.every_epochs == 0
        by_step = config.every_steps > 0 and step % config.every_steps == 0
        if by_epoch or by_step:
            return True
        if not config.every_minutes or step % self._check_every:
            return False
        return distributed.first_says(time.monotonic() - self._saved_at > 60 * config.every_minutes)

    def saved(self) -> None:
        """Starts the clock anew."""
        self._saved_at = time.monotonic()


def load_variables(
    workdir: pathlib.Path, abstract: dict[str, Any], ema: bool = False, step: int | None = None
) -> dict[str, Any]:
    """Reads a model's variables, without the optimizer, onto the default device.

    Args:
        workdir: The run's folder.
        abstract: Shapes and types of `{'params': ..., 'batch_stats': ...}`.
        ema: Read the moving average instead of the weights.
        step: Which checkpoint; the newest where None.

    Raises:
        RunError: There is no checkpoint, or it is of another model, or it holds no moving average.
    """
    if not (workdir / FOLDER).is_dir():
        raise RunError(f"{workdir} holds no checkpoint")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    with ocp.training.Checkpointer((workdir / FOLDER).absolute()) as checkpointer:
        if checkpointer.latest is None:
            raise RunError(f"{workdir} holds no checkpoint")
        chosen = checkpointer.latest.step if step is None else step
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if chosen not in steps:
            raise RunError(f"{workdir} holds no checkpoint {chosen}; there are {', '.join(map(str, steps))}")
        part = "ema" if ema else "model"
        try:
            loaded = checkpointer.load_checkpointables(chosen, {part: wanted})
        except (ValueError, KeyError) as error:
            raise RunError(
                f"checkpoint {chosen} in {workdir} does not hold this {part}: {_first_line(error)}"
            ) from None
    return dict(loaded[part])


def load_reverse(workdir: pathlib.Path, abstract: Any, step: int | None = None) -> Any:
    """Reads the reverse modules' parameters; see `load_variables`, which finds out first whether there is such a step.

    Raises:
        RunError: The checkpoint holds no such reverse modules.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    partial = ocp.Context()
    partial.pytree.loading.partial_load = True
    with partial, ocp.training.Checkpointer((workdir / FOLDER).absolute()) as checkpointer:
        try:
            loaded = checkpointer.load_checkpointables(step, {"training": {"params": {"reverse": wanted}}})
        except (ValueError, KeyError) as error:
            raise RunError(f"{workdir}: its checkpoint holds no such reverse modules: {_first_line(error)}") from None
    return loaded["training"]["params"]["reverse"]


def _parts(state: TrainState) -> dict[str, Any]:
    params = {name: value for name, value in state.params.items() if name != "model"}
    parts: dict[str, Any] = {
        "model": state.variables,
        "training": {"step": state.step, "params": params, "opt_state": state.opt_state},
    }
    return parts if state.ema is None else {**parts, "ema": state.ema}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
