"""Many processes, one computation: how they find one another, and which of them writes."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from sit_jax.errors import ConfigError, RunError, UserError

# Long enough for machines that come up one after another, short enough to notice that one does not.
ARRIVAL_TIMEOUT_S = 50.0
# A process that is silent for so long is dead, and the others end.
HEARTBEAT_TIMEOUT_S = 30
_MESSAGE_BYTES = 2000
_HELLO, _GO = "sit_jax", "go"

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of a run find one another.

    Attributes:
        coordinator: `host:port` of process 0; empty to take all from the environment, if several processes are in it.
        count: Number of processes; 0 if not given.
        index: This process; -1 if not given.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.count > 0, self.index >= 0)
        if any(given) and not all(given):
            raise ConfigError("--coordinator, --num_processes and --process_id: give all three, or none")
        if self.coordinator and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ConfigError(f"--coordinator: {self.coordinator!r} is not of the form host:port")
        if self.count and self.index >= self.count:
            raise ConfigError(f"--process_id: {self.index} must be below --num_processes, {self.count}")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host, int(port)


def launcher(variables: Mapping[str, str] | None = None) -> str:
    """What started several processes, by its environment variables: `Cloud TPU`, `SLURM`, `Open MPI`, or nothing."""
    values = os.environ if variables is None else variables
    hosts = [name for name in values.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(hosts) > 1:
        return "Cloud TPU"
    if "SLURM_PROCID" in values and int(values.get("SLURM_NTASKS") or 1) > 1:
        return "SLURM"
    return "Open MPI" if int(values.get("OMPI_COMM_WORLD_SIZE") or 1) > 1 else ""


def initialize(processes: Processes) -> None:
    """Joins the other processes, where there are any; must come before anything asks JAX for devices.

    Raises:
        RunError: They did not all arrive within a minute; with a given coordinator the message says who is missing.
    """
    started_by = launcher()
    if not processes.coordinator and not started_by:
        return
    explicit: dict[str, Any] = {}
    if processes.coordinator:
        # jax.distributed ends the process with a stack trace where somebody is missing, and does not say who.
        call_the_roll(processes)
        explicit = {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.count,
            "process_id": processes.index,
        }
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=int(ARRIVAL_TIMEOUT_S),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"the processes cannot join one another ({started_by or 'given coordinator'}): {reason}"
        ) from None
    local, everything = jax.local_device_count(), jax.device_count()
    kind = jax.local_devices()[0].device_kind
    place = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{place}: {local} of {everything} devices, {kind}", file=sys.stderr, flush=True)


def call_the_roll(processes: Processes) -> None:
    """Waits until every process has reported to process 0, on the port that the coordinator will use afterwards.

    Raises:
        RunError: Not all did within `ARRIVAL_TIMEOUT_S`; everyone who did is told who is missing.
    """
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    if processes.count == 1:
        return
    answer = _count_the_others(processes, deadline) if processes.index == 0 else _report(processes, deadline)
    if answer != _GO:
        raise RunError(answer)


def _count_the_others(processes: Processes, deadline: float) -> str:
    host, port = processes.address
    arrived: dict[int, socket.socket] = {}
    wanted = set(range(1, processes.count))
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise RunError(f"--coordinator: port {port} cannot be opened here: {error.strerror or error}") from None
        while wanted - arrived.keys() and time.monotonic() < deadline:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(TimeoutError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5.0)
                index = _greeting(connection, processes.count)
                if index is not None:
                    arrived[index] = connection
        missing = sorted(wanted - arrived.keys())
        names = ", ".join(str(index) for index in missing)
        answer = (
            f"process {names} of {processes.count} did not arrive within {ARRIVAL_TIMEOUT_S:.0f} s at {host}:{port}"
        )
        answer = answer if missing else _GO
        for connection in arrived.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{answer}\n".encode())
                connection.recv(1)  # The other side closes first: so the port is free at once.
    return answer


def _greeting(connection: socket.socket, count: int) -> int | None:
    """The index that a process reports, or None where somebody else knocks."""
    with contextlib.suppress(OSError, ValueError):
        word, index, theirs = connection.makefile().readline().split()
        if word == _HELLO and int(theirs) == count and 0 < int(index) < count:
            return int(index)
    return None


def _report(processes: Processes, deadline: float) -> str:
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(processes.address, timeout=5.0) as connection:
            connection.sendall(f"{_HELLO} {processes.index} {processes.count}\n".encode())
            # Process 0 answers at its own deadline at the latest, which may lie behind this one.
            connection.settimeout(ARRIVAL_TIMEOUT_S + 5.0)
            answer = connection.makefile().readline().strip()
            if answer:
                return answer
        time.sleep(0.2)
    return f"process 0 at {processes.coordinator} did not answer within {ARRIVAL_TIMEOUT_S:.0f} s"


def is_first() -> bool:
    """Whether this is the process that writes."""
    return bool(jax.process_index() == 0)


class StopSignal:
    """Whether the run was told to end: SIGTERM here, or a preemption notice to any of the processes."""

    def __init__(self) -> None:
        self._told = False
        self._former: Any = None

    def __enter__(self) -> "StopSignal":
        # Under jax.distributed its own handler is in place, which agrees with the others on a step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)

    def _tell(self, *_: object) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step; the same answer in all processes."""
        if jax.process_count() == 1:
            return self._told
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))


def first_says(value: bool) -> bool:
    """What process 0 decided, in all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def on_first(work: Callable[[], None]) -> None:
    """Does something in process 0 only; what goes wrong there is raised in all of them.

    Raises:
        RunError: The work raised a UserError.
    """
    if jax.process_count() == 1:
        work()
        return
    from jax.experimental import multihost_utils

    message = ""
    if is_first():
        try:
            work()
        except UserError as error:
            message = str(error)
    encoded = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = message.encode()[:_MESSAGE_BYTES]
    encoded[: len(text)] = list(text)
    heard = bytes(np.asarray(multihost_utils.broadcast_one_to_all(encoded))).rstrip(b"\x00").decode(errors="replace")
    if heard:
        raise RunError(heard)
