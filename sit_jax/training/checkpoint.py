"""Writes a run's checkpoints through Orbax: in the background, whole or not at all."""

import contextlib
import logging
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sit_jax.config import CheckpointConfig
from sit_jax.errors import NotFiniteError, RunError, one_line
from sit_jax.io.checkpoint import FOLDER, NO_SCORE, best_step, score, silent_threads
from sit_jax.parallel import distributed
from sit_jax.training.state import TrainState, has_finite_weights

_keep = ocp.training.preservation_policies
_when = ocp.training.save_decision_policies


class Checkpoints:
    """The checkpoints of one run: the newest ones and the best by evaluation accuracy.

    Each holds `model` (parameters and BatchNorm statistics), `ema` where there is one, and `training` (everything
    else), apart from one another so that a model can be read without its optimizer; beside them the metrics, and what
    it was told about itself: configuration, position in the data, mesh.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 1) -> None:
        """Opens the checkpoints of a run's folder.

        Args:
            workdir: The run's folder.
            keep: The newest checkpoints that stay.
        """
        best = _keep.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        logger = logging.getLogger("absl")
        if not any(isinstance(known, _SaidElsewhere) for known in logger.filters):
            logger.addFilter(_SaidElsewhere())
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
        return best_step(self._checkpointer.checkpoints)

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation is better than that of every checkpoint so far."""
        return score(metrics) > max((score(c.metrics) for c in self._checkpointer.checkpoints), default=NO_SCORE)

    def last_before(self, step: int) -> int | None:
        """The newest checkpoint before a step, or None."""
        return max((int(c.step) for c in self._checkpointer.checkpoints if c.step < step), default=None)

    def save(self, state: TrainState, metrics: dict[str, float], metadata: dict[str, Any] | None = None) -> None:
        """Starts writing the state; the arrays may be donated right after.

        Args:
            state: The training state; a step that is already there is not written again.
            metrics: Of the evaluation of this very state; empty without one.
            metadata: JSON values that say what the state is of.

        Raises:
            RunError: This checkpoint or the one before could not be written.
        """
        step = int(state.step)
        if self.latest_step is not None and step <= self.latest_step:
            return
        with self._writing(step):
            self._checkpointer.save_checkpointables_async(
                step, checkpoint_parts(state), metrics=metrics, custom_metadata=metadata
            )

    def restore(self, abstract: TrainState) -> TrainState:
        """Reads the newest checkpoint.

        Args:
            abstract: Shapes, types and shardings of the state (`jax.ShapeDtypeStruct`s with shardings).

        Raises:
            RunError: The checkpoint is of another model.
        """
        step = self.latest_step
        assert step is not None, "there is no checkpoint"
        parts = checkpoint_parts(abstract)
        try:
            with silent_threads():
                loaded = self._checkpointer.load_checkpointables(step, parts)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            with silent_threads():
                raise RunError(self._why_not(step, parts["model"], error)) from None
        training = loaded["training"]
        params = {"model": loaded["model"]["params"], **training["params"]}
        state = TrainState(
            step=training["step"],
            params=params,
            batch_stats=loaded["model"]["batch_stats"],
            opt_state=training["opt_state"],
            ema=loaded.get("ema"),
        )
        if not has_finite_weights(state):
            where = f"checkpoint {step} in {self._checkpointer.directory}"
            raise NotFiniteError(f"{where} holds weights that are not finite; {self._way_out(step)}")
        return state

    def _why_not(self, step: int, model: Any, error: Exception) -> str:
        """Why a checkpoint cannot be restored: it is another model's, or it is damaged."""
        where = f"checkpoint {step} in {self._checkpointer.directory}"
        try:
            there = self._checkpointer.checkpointables_metadata(step).metadata["model"]
            shapes = [sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (there, model)]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            shapes = [[], []]
        if shapes[0] and shapes[0] != shapes[1]:  # None at all where the description itself is unreadable.
            return f"{where} is of another model: {one_line(error)}"
        return f"{where} is damaged (sit checkpoint verify says where); {self._way_out(step)}"

    def _way_out(self, step: int) -> str:
        """What to do about a checkpoint that a run cannot go on from."""
        before = sorted((c.step for c in self._checkpointer.checkpoints if c.step < step), reverse=True)
        earlier = next((other for other in before if self._describes_itself(other)), None)
        return "there is none before it" if earlier is None else f"move {step} away to go on from step {earlier}"

    def _describes_itself(self, step: int) -> bool:
        """Whether a checkpoint's own description can be read; one that a killed process was removing has lost it."""
        try:
            there = self._checkpointer.checkpointables_metadata(step).metadata
            return all(there.get(part) is not None for part in ("model", "training"))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def metadata(self) -> dict[str, Any]:
        """What the newest checkpoint says about itself; empty where there is none, or an old one."""
        if self.latest_step is None:
            return {}
        return dict(self._checkpointer.checkpointables_metadata(self.latest_step).custom_metadata or {})

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
            RunError: It could not be written.
        """
        with self._writing(None):
            self._checkpointer.close()

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        """Says in one line why a checkpoint cannot be written, in whatever way the storage behind Orbax says it."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = _storage_problem(error)
            if reason is None:
                raise
            which = "the last checkpoint" if step is None else f"checkpoint {step}, or the one before,"
            raise RunError(
                f"{which} could not be written in {self._checkpointer.directory}: {reason}; what is whole there stays "
                "as it is: make room, and go on with --resume"
            ) from None


class SaveSchedule:
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
        return distributed.broadcast_from_process_0(time.monotonic() - self._saved_at > 60 * config.every_minutes)

    def saved(self) -> None:
        """Starts the clock anew."""
        self._saved_at = time.monotonic()


def checkpoint_parts(state: TrainState) -> dict[str, Any]:
    """A state (or its abstract twin) as it lies in a checkpoint: `model`, `training` and, where there is one, `ema`."""
    params = {name: value for name, value in state.params.items() if name != "model"}
    parts: dict[str, Any] = {
        "model": state.variables,
        "training": {"step": state.step, "params": params, "opt_state": state.opt_state},
    }
    return parts if state.ema is None else {**parts, "ema": state.ema}


def _storage_problem(error: BaseException) -> str | None:
    """What the file system said, wherever it stands in a chain of errors; None where it said nothing."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        number = re.search(r"os_error_code='(\d+)'", str(seen))  # TensorStore's way of handing it on.
        if number:
            return os.strerror(int(number[1]))
        seen = seen.__cause__ or seen.__context__
    return None


class _SaidElsewhere(logging.Filter):
    """Drops what Orbax's threads log when they fail: a traceback each, of an error that is raised to the caller too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname
