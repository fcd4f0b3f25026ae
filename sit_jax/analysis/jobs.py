"""Trainings as child processes, one after the other or several at once; this process opens no device."""

import contextlib
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sit_jax.errors import ConfigError, PreemptedError, require
from sit_jax.io.lock import lock_holder
from sit_jax.io.runs import writing

_POLL_S = 0.2
LOG = "train.log"
# The first chip of a TPU, by the generation of its driver.
_TPU = ("accel0", "vfio/0")


class Job(NamedTuple):
    """A training in a run directory.

    Attributes:
        name: The name in messages.
        folder: The run directory, which has the log.
        command: The arguments of `sit`; they must continue an interrupted run.
        outcome: Returns a text about the result, such as its accuracy; None until the training is complete.
    """

    name: str
    folder: pathlib.Path
    command: Sequence[str]
    outcome: Callable[[], str | None]


class Failure(NamedTuple):
    """A training that ended without a result: its name, its log, and the last line of that."""

    name: str
    log: pathlib.Path
    reason: str


class _Running(NamedTuple):
    job: Job
    process: "subprocess.Popen[bytes]"
    begun: float


def log(line: str) -> None:
    """Prints a line of `sit compare` on standard error."""
    print(f"compare: {line}", file=sys.stderr, flush=True)


def devices_of_slots(parallel: int, dev: pathlib.Path = pathlib.Path("/dev")) -> list[str | None]:
    """Returns the CUDA_VISIBLE_DEVICES of each of several simultaneous trainings; None for all devices.

    `dev` is the folder of device files.

    Raises:
        ConfigError: There are GPUs, but fewer than trainings; or a TPU, which one process opens at a time.
    """
    if parallel == 1 or os.environ.get("JAX_PLATFORMS") == "cpu":
        return [None] * parallel
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [match[1] for path in dev.glob("nvidia*") if (match := re.search(r"(\d+)$", path.name))]
    devices = sorted(numbers, key=int) if given is None else [part for part in given.split(",") if part]
    if not devices:
        # JAX would silently train on the CPU in the processes that come second.
        has_tpu = any((dev / name).exists() for name in _TPU)
        require(not has_tpu, "--parallel", "must be 1 on a TPU, which one process opens at a time")
        return [None] * parallel
    if len(devices) < parallel:
        raise ConfigError("--parallel", f"must be at most the number of GPUs, {len(devices)}, got {parallel}")
    return list(devices[:parallel])


def run_jobs(jobs: Sequence[Job], slots: Sequence[str | None]) -> list[Failure]:
    """Runs all jobs that are not complete, as many at once as there are slots; the others go on if one fails.

    A run directory in which another process trains is waited for: after SIGKILL to this process, its children go on.

    Args:
        jobs: The trainings, in order.
        slots: CUDA_VISIBLE_DEVICES of each simultaneous training; None for that of this process.

    Returns:
        The jobs that failed.

    Raises:
        PreemptedError: SIGTERM or SIGHUP; the children have saved their state and ended. So have they when Ctrl-C
            raises KeyboardInterrupt.
    """
    queue = [job for job in jobs if job.outcome() is None]
    running: dict[int, _Running] = {}
    failures: list[Failure] = []
    durations: list[float] = []
    waited: set[str] = set()
    with _signals() as received, _terminated(running, received):
        while queue or running:
            for index, device in enumerate(slots):
                if index in running and running[index].process.poll() is not None:
                    job, _, begun = ended = running.pop(index)
                    text = job.outcome()
                    if text is not None:
                        durations.append(time.monotonic() - begun)
                        left = _left(len(queue) + len(running), durations, len(slots))
                        log(f"{job.name}: {text} after {durations[-1]:.0f} s; {left}")
                    elif lock_holder(job.folder):  # A child of a former command was faster.
                        queue.insert(0, job)
                    else:
                        failures.append(_failure(ended))
                        log(f"{job.name}: failed: {failures[-1].reason}; see {failures[-1].log}")
                if index not in running and (following := _next(queue, waited)):
                    queue.pop(0)
                    if following.outcome() is None:
                        running[index] = _start(following, device)
            time.sleep(_POLL_S)
            _raise_if_any(received)
    return failures


def _left(count: int, durations: list[float], parallel: int) -> str:
    minutes = count / parallel * statistics.fmean(durations) / 60
    return f"{count} left" + (f", about {minutes:.0f} min" if count else "")


def _next(queue: list[Job], waited: set[str]) -> Job | None:
    """Returns the first job, but none while another process trains in one of the directories, on these devices."""
    holders = [(job, holder) for job in queue if (holder := lock_holder(job.folder))]
    for job, holder in holders:
        if job.name not in waited:
            waited.add(job.name)
            log(f"{job.name}: waiting for {holder}, which trains in {job.folder}")
    return queue[0] if queue and not holders else None


def _start(job: Job, device: str | None) -> _Running:
    environment = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    with writing(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / LOG).open("ab") as output:
            # A session of its own: Ctrl-C reaches this process only, which lets the children save their state.
            process = subprocess.Popen(
                [sys.executable, "-m", "sit_jax", *job.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    log(f"{job.name}: training; its log is {job.folder / LOG}")
    return _Running(job, process, time.monotonic())


def _failure(ended: _Running) -> Failure:
    path, code = ended.job.folder / LOG, ended.process.returncode
    lines = [line for line in path.read_text(errors="replace").split("\n") if line.strip()]
    reason = f"killed by signal {-code}" if code < 0 else lines[-1].strip()[-300:] if lines else f"exit code {code}"
    return Failure(ended.job.name, path, reason)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects signals to stop, so that none comes between the start of a child and the note of it."""
    received: list[int] = []
    # Signals that are ignored stay so, as SIGHUP under `nohup`.
    usual = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [x for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(x) in usual]
    former = {x: signal.signal(x, lambda number, _: received.append(number)) for x in numbers}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _raise_if_any(received: list[int]) -> None:
    if received and received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    if received:
        raise PreemptedError("stopped by a signal: the trainings have saved their state; the same command continues")


@contextlib.contextmanager
def _terminated(running: dict[int, _Running], received: list[int]) -> Iterator[None]:
    """Ends the processes that still run at the end, by SIGTERM, after which they save; at a second signal, at once."""
    try:
        yield
    finally:
        processes = [each.process for each in running.values()]
        for process in processes:
            process.terminate()
        while any(process.poll() is None for process in processes):
            if len(received) > 1:
                for process in processes:
                    process.kill()
            time.sleep(_POLL_S)
