"""Real processes that find one another, miss one another, and train together."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
import quick_compile

from sit_jax.analysis.checkpoints import list_checkpoints, read_contents, verify
from sit_jax.cli import app as cli
from sit_jax.errors import MissingProcessError, PreemptedError, RunError
from sit_jax.io.load import load_run
from sit_jax.parallel import distributed
from sit_jax.parallel.distributed import Processes, wait_for_processes
from sit_jax.training.metrics import read_metrics

# Some gradients are 0 but for rounding; with the usual epsilon Adam would make a full step of what is left.
BOTH: dict[str, Any] = {"model.dim": 16, "model.num_heads": 2, "model.depth": 2, "epochs": 1, "batch_size": 128}
BOTH |= {"optim.warmup_epochs": 0.0, "optim.eps": 1e-5}
SMALL = {"model.stage_blocks": "(1,1)", "log.every_steps": 1, **BOTH, **{f"teacher.{x}": y for x, y in BOTH.items()}}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def test_connections_of_other_programs_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "ARRIVAL_TIMEOUT_S", 4.0)
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(wait_for_processes, Processes(f"localhost:{port}", 2, 0))
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"sit_jax 7 2\n", b"sit_jax 1 3\n", b"\xff\xfe\n"):
            for _ in range(50):
                try:
                    with socket.create_connection(("localhost", port), timeout=2) as connection:
                        connection.sendall(greeting)
                    break
                except OSError:
                    time.sleep(0.05)
        assert not first.done()
        wait_for_processes(Processes(f"localhost:{port}", 2, 1))
        first.result(timeout=10)


def test_port_in_use() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port} "):
            wait_for_processes(Processes(f"localhost:{port}", 2, 0))


@pytest.mark.parametrize(
    ("words", "option", "fact"),
    [
        ("--coordinator=localhost:1", "--num_processes", "all three"),
        ("--coordinator=localhost --num_processes=2 --process_id=0", "--coordinator", "host:port"),
        ("--coordinator=localhost:1 --num_processes=2 --process_id=2", "--process_id", "2"),
        ("--coordinator=localhost:99999 --num_processes=2 --process_id=0", "--coordinator", "99999"),
    ],
)
def test_invalid_options(words: str, option: str, fact: str, capsys: Any) -> None:
    assert cli.main(["evaluate", "--workdir", "none", *words.split()]) == 2
    error = capsys.readouterr().err
    assert option in error
    assert fact in error


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[017-019,030],other",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def found(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Any:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return distributed.find_processes()


def test_processes_are_found_by_their_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch) is None
    slurm = found(monkeypatch, **SLURM)
    assert (slurm.launcher, slurm.count, slurm.index) == ("SLURM", 8, 3)
    assert slurm.address[0] == "node017"
    assert 1024 < slurm.address[1] < 2**16
    assert found(monkeypatch, **{**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    mpi = found(monkeypatch, **OPEN_MPI)
    assert (mpi.launcher, mpi.count, mpi.index) == ("Open MPI", 2, 1)
    assert mpi.address[0] == "10.96.0.1"
    with pytest.raises(RunError, match="Open MPI"):
        found(monkeypatch, **{**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "nonsense"})
    # A task that is alone on its node gets all its GPUs.
    for per_node, visible, expected in (
        ("1(x8)", "0,1,2,3", [0, 1, 2, 3]),
        ("1", "0,1", [0, 1]),
        ("2(x3),1", "0,1", None),
        ("1(x8)", "", None),
    ):
        slurm = found(monkeypatch, **{**SLURM, "SLURM_STEP_TASKS_PER_NODE": per_node, "CUDA_VISIBLE_DEVICES": visible})
        assert slurm.local_devices == expected


def test_every_process_lists_the_missing_ones(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(distributed, "ARRIVAL_TIMEOUT_S", 2.0)
    here = {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_NTASKS": "5"}
    first = found(monkeypatch, **{**SLURM, **here})
    with ThreadPoolExecutor() as pool:
        third = pool.submit(wait_for_processes, Processes(first.coordinator, 5, 2))
        assert cli.main(["evaluate", "--workdir", "none"]) == 1  # Not 2: starting again may help.
        assert "process 1, 3, 4 of 5 " in capsys.readouterr().err
        with pytest.raises(MissingProcessError, match=r"process 1, 3, 4 of 5 .* localhost:"):
            third.result(timeout=30)
    with pytest.raises(MissingProcessError, match="process 0 at localhost:"):
        wait_for_processes(Processes(f"localhost:{free_port()}", 2, 1))


def start(devices: int, *words: str) -> "subprocess.Popen[str]":
    flags = f"{quick_compile.FLAGS} {quick_compile.devices(devices)}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sit_jax", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def overrides(digits_dir: str, **more: Any) -> list[str]:
    values = {**SMALL, "data.data_dir": digits_dir, **more}
    return ["train", "--config", "configs/digits.py", *(f"--config.{key}={value}" for key, value in values.items())]


def start_together(count: int, *words: str) -> "list[subprocess.Popen[str]]":
    """Processes with eight devices in all."""
    together = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    return [start(8 // count, *words, *together, f"--process_id={index}") for index in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, digits_dir: str) -> pathlib.Path:
    """The run of one process, with copies of the weights on eight devices."""
    run = tmp_path_factory.mktemp("alone") / "run"
    process = start(8, *overrides(digits_dir), "--workdir", str(run))
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return run


def assert_same_run(mine: pathlib.Path, theirs: pathlib.Path) -> None:
    """Losses to 1e-5, every weight and BatchNorm statistic to 1e-4, on the teacher and on the student."""
    for part in ("", "teacher"):
        lines = [read_metrics(run / part) for run in (mine, theirs)]
        assert [(x["step"], x["kind"]) for x in lines[0]] == [(x["step"], x["kind"]) for x in lines[1]]
        assert len(lines[0]) == 12
        for one, other in zip(*lines, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert lines[0][-1]["examples"] == lines[1][-1]["examples"] == 359
        weights = [load_run(run / part).variables for run in (mine, theirs)]
        assert weights[0]["batch_stats"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *weights)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(2, {"mesh.fsdp": 4}), (4, {"mesh.fsdp": 2, "mesh.tensor": 2})])
def test_processes_train_what_one_trains(
    count: int, mesh: dict[str, int], alone: pathlib.Path, tmp_path: pathlib.Path, digits_dir: str
) -> None:
    run = tmp_path / "run"
    processes = start_together(count, *overrides(digits_dir, **mesh), "--workdir", str(run))
    printed = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, printed
    assert f"process 1 of {count}: {8 // count} of 8 devices" in printed[1]
    assert "Written: " in printed[0]
    assert all("Written: " not in text for text in printed[1:])  # Only process 0 writes and tells.
    assert_same_run(run, alone)


@pytest.mark.slow
def test_notice_to_one_of_two_stops_both_and_one_process_goes_on(
    alone: pathlib.Path, tmp_path: pathlib.Path, digits_dir: str
) -> None:
    run = tmp_path / "run"
    words = [*overrides(digits_dir, **{"mesh.fsdp": 4}), "--workdir", str(run)]
    two = start_together(2, *words)
    wait_for_lines(run / "metrics.jsonl", two)
    two[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=120)[0] for process in two]
    assert [process.returncode for process in two] == [PreemptedError.exit_code] * 2, printed
    assert "stopped by a signal: saved after step " in printed[0]
    (newest,) = [entry for entry in list_checkpoints(run) if entry.newest]
    assert 0 < newest.step < 11
    contents = read_contents(run)
    assert (contents.metadata["mesh"], contents.metadata["processes"]) == ({"data": 2, "fsdp": 4, "tensor": 1}, 2)
    assert verify(run).problems == ()
    # Written by two processes on 2 x 4 x 1, continued by one on 8 x 1 x 1.
    process = start(8, *overrides(digits_dir), "--workdir", str(run), "--resume")
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert_same_run(run, alone)


def wait_for_lines(metrics: pathlib.Path, processes: "list[subprocess.Popen[str]]", beyond: int = 0) -> None:
    """Waits for metrics of a step beyond the given one."""
    deadline = time.monotonic() + 300
    while not any(x["step"] > beyond for x in read_metrics(metrics.parent)) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.02)


@pytest.mark.slow
def test_mistake_of_one_of_two_ends_both(tmp_path: pathlib.Path, digits_dir: str) -> None:
    # One host has no data: it says so and ends with 2 at once, and the other notices.
    together = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--workdir", str(tmp_path / "run")]
    folders = (digits_dir, "/proc/none")
    two = [start(1, *overrides(data), *together, f"--process_id={i}") for i, data in enumerate(folders)]
    try:
        other, text = (process.communicate(timeout=120)[0] for process in two)
    finally:
        for process in two:
            process.kill()
    assert two[1].returncode == 2, text
    assert "sit train: data.data_dir: /proc/none cannot be written" in text
    assert two[0].returncode not in (0, 2), other


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_other(victim: int, tmp_path: pathlib.Path, digits_dir: str) -> None:
    two = start_together(2, *overrides(digits_dir, **{"teacher.epochs": 1000}), "--workdir", str(tmp_path))
    wait_for_lines(tmp_path / "teacher" / "metrics.jsonl", two)
    two[victim].send_signal(signal.SIGKILL)
    survivor = two[1 - victim]
    try:
        text, _ = survivor.communicate(timeout=60)
    finally:
        for process in two:
            process.kill()
            process.communicate()
    assert survivor.returncode != 0, text
