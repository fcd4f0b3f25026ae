"""Contenders that take turns, each framework in a process of its own.

The parent asks one child at a time, by a line of JSON on its standard input, and waits for the answer; so only one
computes, and a machine that is busy with other things slows all of them alike. A child whose thread pool went on
spinning would slow the next one: every answer tells the processor time that the child has used while it was waiting.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Answer = dict[str, Any]


class Child:
    """A long-lived process that answers requests.

    Attributes:
        name: Of the framework, for messages.
        idle_cpu_s: Processor seconds that it used while others had their turn.
    """

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        """Starts it, with so many processor cores to itself that every framework's pool has `threads` threads."""
        self.name, self.idle_cpu_s = name, 0.0
        taken = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        # Affinity is what both thread pools look at; the variables are for OpenMP and MKL.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment["BENCHMARK_CORES"] = taken
        # Others need memory of the accelerator, too.
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str, **arguments: Any) -> Answer:
        """Sends a request and waits for its answer.

        Raises:
            RuntimeError: The child failed at it, or died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"what": what, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()} at {what} {arguments}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name} at {what} {arguments}: {answer['error']}")
        self.idle_cpu_s += answer.pop("idle_cpu_s")
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def children(script: str, names: list[str], threads: int, keep: str = "jax") -> Iterator[dict[str, Child]]:
    """One child for each name, running `script --child NAME`; ended when the block is left."""
    os.environ["BENCHMARK_KEEP_MEMORY"] = keep
    started = {name: Child(name, [sys.executable, script, "--child", name], threads) for name in names}
    try:
        yield started
    finally:
        for child in started.values():
            child.close()


def take_cores() -> int:
    """In a child, before a framework is imported: keeps to the cores that the parent gave; returns how many."""
    cores = {int(core) for core in os.environ["BENCHMARK_CORES"].split(",")}
    os.sched_setaffinity(0, cores)
    return len(cores)


def add_keep_memory(parser: argparse.ArgumentParser) -> None:
    """The option that says which framework's processes have `sit`'s own setting of the allocator."""
    parser.add_argument(
        "--keep_memory",
        choices=("jax", "both", "neither"),
        default="jax",
        help="whose processes keep the memory that they free: `sit` sets its own so, PyTorch leaves glibc's default",
    )


def keep_memory(framework: str) -> None:
    """In a child: sets the allocator as the option says."""
    if os.environ["BENCHMARK_KEEP_MEMORY"] in (framework, "both"):
        from sit_jax.cli.runtime import keep_memory as keep

        keep()


def serve(child: str, make: Callable[[], Any]) -> None:
    """In a child: answers requests, by the public methods of what is made, until the parent has no more."""
    keep_memory("jax" if child == "jax" else "torch")
    served = make()
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    used = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - used
        request = json.loads(line)
        try:
            answer = getattr(served, request["what"])(**request["arguments"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps({**answer, "idle_cpu_s": idle}) + "\n")
        answers.flush()
        used = time.process_time()


def time_calls(call: Callable[[int], Any], wait: Callable[[Any], None], calls: int, each: bool) -> Answer:
    """In a child: seconds per call.

    Args:
        call: Starts the computation with the input buffer of that number.
        wait: Waits until a result is there.
        calls: How often.
        each: Wait after every call, rather than after the last.
    """
    begun = time.perf_counter()
    for index in range(calls):
        result = call(index)
        if each:
            wait(result)
    wait(result)
    return {"seconds": (time.perf_counter() - begun) / calls}


def time_interleaved(
    contenders: Mapping[str, tuple[Child, str]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round: A B A B ...

    Args:
        contenders: Name -> child, and what it calls this contender.
        rounds: Turns of each.
        seconds: A turn lasts about so long.
    """
    calls: dict[str, int] = {}
    for name, (child, case) in contenders.items():
        child.ask("time", case=case, calls=1)
        once = child.ask("time", case=case, calls=1)["seconds"]
        calls[name] = max(1, math.ceil(seconds / once))
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (child, case) in contenders.items():
            found[name].append(child.ask("time", case=case, calls=calls[name])["seconds"])
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over the rounds, each compared with the turn beside it."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def resident_mib() -> float:
    """Memory of this process that is resident now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def forget_peak() -> None:
    """Gives free memory back to the system, and lets `peak_mib` begin anew (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The largest resident memory since `forget_peak`."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return math.nan


def machine(threads: int) -> str:
    """The machine and the date, in words."""
    names = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{threads} threads of {name}, {platform.system()}, {time.strftime('%Y-%m-%d')}"


def table(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table of some keys of dictionaries; `columns` maps key -> heading. Missing values stay empty."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(key, "") for key in columns]
        lines.append("| " + " | ".join(f"{x:,.3g}" if isinstance(x, float) else str(x) for x in cells) + " |")
    return "\n".join(lines)
