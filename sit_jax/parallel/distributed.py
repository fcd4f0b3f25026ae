"""Multi-process execution: connects the processes of a run, and coordinates writing and stopping."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sit_jax.errors import ConfigError, MissingProcessError, RunError, UserError, one_line

# Long enough for machines that start one after another, short enough to report a missing one soon.
ARRIVAL_TIMEOUT_S = 50.0
# A process that sends no heartbeat for this long is considered dead, and the others exit.
HEARTBEAT_TIMEOUT_S = 30
_MESSAGE_BYTES = 2000
_HELLO, _GO = "sit_jax", "go"


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of a run connect: `host:port` of process 0, their number, and the index of this one.

    The defaults mean that nothing was given, so that the processes are auto-detected. `local_devices` are the indices
    of the local accelerators of this process; None leaves the choice to JAX.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1
    launcher: str = "given coordinator"
    local_devices: list[int] | None = None

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.count > 0, self.index >= 0)
        if any(given) and not all(given):
            raise ConfigError("--coordinator, --num_processes and --process_id", "give all three, or none")
        if self.coordinator and not (re.fullmatch(r".+:\d+", self.coordinator) and self.address[1] < 2**16):
            raise ConfigError("--coordinator", f"{self.coordinator!r} is not of the form host:port")
        if self.count and self.index >= self.count:
            raise ConfigError("--process_id", f"{self.index} must be below --num_processes, {self.count}")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host, int(port)


_LAUNCHERS = {"gcetpu": "Cloud TPU", "gketpu": "Cloud TPU", "slurm": "SLURM", "ompi": "Open MPI"}


def find_processes() -> Processes | None:
    """Detects the processes of the launcher with JAX's cluster detection; returns None for a single process.

    The detection queries the metadata server of Cloud TPU, and the variables that SLURM and Open MPI set. Raises a
    RunError if they are incomplete.
    """
    # Private API, but the only code that detects all launchers; pyproject.toml restricts JAX to tested versions.
    from jax._src.clusters import ClusterEnv

    clusters = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and kind.name in _LAUNCHERS]
    cluster = next((kind for kind in clusters if kind.is_env_present()), None)
    if cluster is None:
        return None
    name = _LAUNCHERS[cluster.name]
    try:
        count = cluster.get_process_count()
        if count == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = cluster.get_coordinator_address(int(ARRIVAL_TIMEOUT_S), port)
        devices = _devices_of_a_lone_task() if name == "SLURM" else None
        return Processes(address, count, cluster.get_process_id(), name, devices)
    except (RuntimeError, ValueError, KeyError, OSError) as error:  # OSError: the metadata server did not answer.
        reason = one_line(error)
        raise RunError(f"{name} was detected, but does not define the other processes: {reason}") from None


def _devices_of_a_lone_task() -> list[int] | None:
    """Returns all GPUs of a SLURM node with one task, of which JAX would take the first, or None to leave it to JAX."""
    per_node = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    alone = visible and set(per_node) == {"1"} and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    return list(range(len(visible))) if alone else None


def initialize(processes: Processes) -> None:
    """Connects to the other processes, if there are any; must be called before JAX devices are accessed.

    Raises a MissingProcessError that lists processes missing after a minute, and a RunError for other reasons.
    """
    found = processes if processes.coordinator else find_processes()
    if found is None:
        return
    wait_for_processes(found)
    try:
        jax.distributed.initialize(
            coordinator_address=found.coordinator,
            num_processes=found.count,
            process_id=found.index,
            local_device_ids=found.local_devices,
            initialization_timeout=int(ARRIVAL_TIMEOUT_S),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise RunError(f"the processes cannot connect to each other ({found.launcher}): {reason}") from None
    place = f"process {jax.process_index()} of {jax.process_count()}"
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices, {jax.local_devices()[0].device_kind}"
    print(f"{place}: {devices}", file=sys.stderr, flush=True)


def wait_for_processes(processes: Processes) -> None:
    """Waits until every process has reported to process 0, on the port that the coordinator will use afterwards.

    After `ARRIVAL_TIMEOUT_S`, all that are present raise a MissingProcessError with the missing ones.
    """
    # `jax.distributed.initialize` does not do this: if a process is missing, it ends each of the others with SIGABRT,
    # which Python cannot catch, and a stack trace that says 'RegisterTask: DEADLINE_EXCEEDED' and names no process
    # (jax 0.10.2, with and without jax_enable_recoverability).
    if processes.count > 1:
        answer = _collect_reports(processes) if processes.index == 0 else _report(processes)
        if answer != _GO:
            raise MissingProcessError(answer)


def _collect_reports(processes: Processes) -> str:
    """Returns the answer to the processes that have reported to process 0: to go on, or which ones are missing."""
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    port = processes.address[1]
    arrived: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise RunError(f"--coordinator: port {port} cannot be opened here: {error.strerror or error}") from None
        while len(arrived) < processes.count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # It timed out, or is a connection of another program.
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5.0)
                word, index, count = connection.makefile().readline().split()
                if word == _HELLO and int(count) == processes.count and 0 < int(index) < processes.count:
                    arrived[int(index)] = connection
        missing = ", ".join(str(index) for index in range(1, processes.count) if index not in arrived)
        late = f"of {processes.count} did not arrive within {ARRIVAL_TIMEOUT_S:.0f} s at {processes.coordinator}"
        answer = f"process {missing} {late}" if missing else _GO
        for connection in arrived.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{answer}\n".encode())
                connection.recv(1)  # The other side closes first, so that the port is free at once.
    return answer


def _report(processes: Processes) -> str:
    """Reports to process 0 and returns its answer."""
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(processes.address, timeout=5.0) as connection:
            connection.sendall(f"{_HELLO} {processes.index} {processes.count}\n".encode())
            # Process 0 answers by its own deadline, which may be later than that of this process.
            connection.settimeout(ARRIVAL_TIMEOUT_S + 5.0)
            answer = connection.makefile().readline().strip()
            if answer:
                return answer
        time.sleep(0.2)
    return f"process 0 at {processes.coordinator} did not answer within {ARRIVAL_TIMEOUT_S:.0f} s"


def is_process_0() -> bool:
    """Returns whether this is process 0, which writes the outputs."""
    return bool(jax.process_index() == 0)


# In addition to SIGTERM.
_STOP_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class PreemptionMonitor:
    """Detects a request to stop: a signal to this process, or a preemption notice in any process.

    The signals are SIGTERM, SIGHUP (a terminal that closes), and SIGUSR1 and SIGUSR2 (SLURM's `--signal`). Signals that
    are ignored stay so, as SIGHUP under `nohup`.

    One monitor is used for a whole command, which may train a teacher and then its student: a request between the two,
    or at the teacher's last step, stops the student. Contexts may be nested; the outermost one resets the monitor.
    """

    # Whether a stop was requested, and agreed on before.
    requested = False
    _depth = 0
    # The sync point of jax.distributed needs a step that only increases, over all loops of a command.
    _asked = 0

    def __init__(self) -> None:
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionMonitor":
        PreemptionMonitor._depth += 1
        if PreemptionMonitor._depth == 1:
            PreemptionMonitor.requested = False
            if threading.current_thread() is threading.main_thread():
                others = [x for x in _STOP_SIGNALS if signal.getsignal(x) is signal.SIG_DFL]
                self._former = {x: signal.signal(x, self._terminate) for x in others}
                # Under jax.distributed, its own handler is installed, which agrees on a step with the other processes.
                if jax.process_count() == 1:
                    self._former[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        PreemptionMonitor._depth -= 1
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @staticmethod
    def _request(*_: object) -> None:
        PreemptionMonitor.requested = True

    @staticmethod
    def _terminate(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    def should_stop(self) -> bool:
        """Returns whether to save and stop after this step, equal in all processes. Must be called at every step."""
        if jax.process_count() > 1:
            PreemptionMonitor._asked += 1
            stop = multihost_utils.reached_preemption_sync_point(PreemptionMonitor._asked)
            PreemptionMonitor.requested |= bool(stop)
        return PreemptionMonitor.requested


# How long a failing process waits for the others to fail as well.
PARTING_S = 10.0


def abort_after_failure(code: int) -> None:
    """Exits a failed process of several with its exit code, although the others may not know of the failure.

    Otherwise it would wait for them at a barrier, and they for it in a collective, for minutes. If all processes fail,
    this returns and the process exits as usual; otherwise the missing heartbeat informs the others.
    """
    if jax.process_count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    timer = threading.Timer(PARTING_S, os._exit, [code])
    timer.daemon = True
    timer.start()
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()
    timer.cancel()


def broadcast_from_process_0(value: bool) -> bool:
    """Returns process 0's value in all processes."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def run_on_process_0(work: Callable[[], None]) -> None:
    """Runs a function in process 0 only; a UserError is raised in all processes, as a RunError."""
    if jax.process_count() == 1:
        work()
        return
    message = ""
    if is_process_0():
        try:
            work()
        except UserError as error:
            message = str(error)
    encoded = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    received = np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(encoded, np.uint8)))
    message = received.tobytes().rstrip(b"\0").decode(errors="replace")
    if message:
        raise RunError(message)
