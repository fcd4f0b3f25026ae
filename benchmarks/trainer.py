"""What the trainer adds to its bare step: seconds per step of `sit train`'s loop beside the same compiled step alone.

    python benchmarks/trainer.py --model sit_xsmall --batch_size 16

The run is a student's distillation on synthetic JPEGs (`data.name=synthetic/1000`), with everything that a run does at
each step: reading and decoding, placing the batch, metrics, log, progress. Between stretches of its steps the same
compiled step runs alone, from a state of its own on a batch that lies on the device: A B A B. Each stretch ends when
its last step is done. Evaluation and checkpoints come at a run's end, after the last stretch.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import shapes
import turns

WARM_UP = 3


class Stopwatch:
    """Stands between the loop and its data and its step, and times stretches of steps.

    Attributes:
        loop: Seconds per step of each stretch of the trainer's loop.
        bare: Seconds per step of each stretch of the bare step, after the loop's.
    """

    def __init__(self, stretch: int) -> None:
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._stretch = stretch
        self._step: Any = None
        self._last: Any = None
        self._given: Any = None

    def make_step(self, make: Any) -> Any:
        """A `make_train_step` whose steps are the given one's, and known here."""

        def made(*arguments: Any, **options: Any) -> Any:
            self._step = make(*arguments, **options)
            return self._call

        return made

    def make_batches(self, batches: Any) -> Any:
        """A `TrainData.batches` that stops the clock when a stretch is done."""

        def made(data: Any, *arguments: Any) -> Iterator[Any]:
            stream = batches(data, *arguments)
            try:
                yield from self._watched(stream)
            finally:
                stream.close()

        return made

    def _call(self, state: Any, batch: Any, teachers: Any) -> Any:
        import jax
        import jax.numpy as jnp

        if self._given is None:
            # The step takes its state's memory: the bare one needs a copy.
            self._given = jax.tree.map(jnp.copy, state), batch, teachers
        self._last = self._step(state, batch, teachers)
        return self._last

    def _watched(self, stream: Any) -> Iterator[Any]:
        import jax

        for _ in range(WARM_UP):
            yield next(stream)
        jax.block_until_ready(self._last)
        self._run_alone()
        self.bare.clear()
        while True:
            begun = time.perf_counter()
            for _ in range(self._stretch):
                yield next(stream)
            jax.block_until_ready(self._last)
            self.loop.append((time.perf_counter() - begun) / self._stretch)
            self._run_alone()

    def _run_alone(self) -> None:
        import jax

        # The readers fill their buffers first: so the loop's stretch pays for its own images, and this one for none.
        wait_until_idle()
        state, batch, teachers = self._given
        begun = time.perf_counter()
        for _ in range(self._stretch):
            state, metrics = self._step(state, batch, teachers)
        jax.block_until_ready((state, metrics))
        self.bare.append((time.perf_counter() - begun) / self._stretch)
        self._given = state, batch, teachers


def wait_until_idle(pause: float = 0.1, most: float = 60) -> None:
    """Waits until this process's threads have nothing to do."""
    for _ in range(round(most / pause)):
        used = time.process_time()
        time.sleep(pause)
        if time.process_time() - used < 0.05 * pause:
            return


def measure(arguments: argparse.Namespace, scratch: pathlib.Path) -> Stopwatch:
    """Trains for as many steps as the stretches need."""
    from sit_jax.cli.runtime import set_log_levels
    from sit_jax.config import CheckpointConfig, Config, DataConfig, LossConfig, ModelConfig, TeacherConfig
    from sit_jax.data.pipeline import TrainData
    from sit_jax.training import loop as run
    from sit_jax.training.step import make_train_step

    set_log_levels()
    student = shapes.architecture(arguments.model, arguments.tiny)
    teacher = arguments.model.replace("sit_", "lvvit_")
    shapes.write_folder(scratch / "given", teacher, arguments.tiny, rtsm=False)
    batch = arguments.batch_size
    # One step more, whose batch is asked for when the last stretch is done.
    steps = WARM_UP + arguments.stretch * arguments.rounds + 1
    config = Config(
        model=ModelConfig(architecture=student, dtype=arguments.dtype),
        teacher=TeacherConfig(
            model=ModelConfig(architecture=student.without_slimming(), dtype=arguments.dtype),
            run=str(scratch / "given"),
        ),
        data=DataConfig(
            name=f"synthetic/{student.num_classes}", train_split=f"train[:{steps * batch}]", eval_split=f"val[:{batch}]"
        ),
        loss=LossConfig(token=2.0, logits=2.0),
        batch_size=batch,
        eval_batch_size=batch,
        checkpoint=CheckpointConfig(every_epochs=0),
    )
    watch = Stopwatch(arguments.stretch)
    with (
        mock.patch.object(run, "make_train_step", watch.make_step(make_train_step)),
        mock.patch.object(TrainData, "batches", watch.make_batches(TrainData.batches)),
    ):
        run.run(config, scratch / "run")
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sit_xsmall", help="one of the paper's students")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--stretch", type=int, default=10, help="steps between two looks at the clock")
    parser.add_argument("--rounds", type=int, default=5, help="stretches of each")
    parser.add_argument("--tiny", action="store_true", help="four narrow blocks on small pictures, to try the script")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        watch = measure(arguments, pathlib.Path(scratch))
    bare, loop = statistics.median(watch.bare), statistics.median(watch.loop)
    # Each stretch of the loop is compared with the bare one behind it.
    added = turns.ratio(watch.loop, watch.bare) - 1
    rows = [{"what": "bare step", "seconds": bare}, {"what": "trainer", "seconds": loop, "added": f"{added:+.1%}"}]
    metadata = f"{arguments.model}, batch {arguments.batch_size}, {arguments.dtype}; "
    metadata += f"{turns.machine(len(os.sched_getaffinity(0)))}; {arguments.rounds} rounds of {arguments.stretch} steps"
    print(f"{metadata}\n\n{turns.table(rows, {'what': '', 'seconds': 's per step', 'added': 'added'})}")
    if arguments.json:
        figures = {"about": metadata, "bare_s": watch.bare, "loop_s": watch.loop, "added": added}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
