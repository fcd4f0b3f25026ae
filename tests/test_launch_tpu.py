"""launch/tpu_pod.sh with a gcloud that keeps two workers in folders."""

import os
import pathlib
import re
import shlex
import signal
from itertools import groupby

import pytest
from launch_machine import Machine

POD = ("--name", "pod", "--zone", "us-west4-a", "--poll", "0")
UP = (
    *("up", *POD, "--type", "v5litepod-8", "--pause", "0"),
    *("--config", "configs/digits.py", "--workdir", "/gcs/it's/my run", "--config.epochs=3"),
)
WORDS = ["train", "--config", "configs/digits.py", "--workdir", "/gcs/it's/my run", "--resume", "--config.epochs=3"]


def what(command: list[str]) -> str:
    """A command in a word: what gcloud was to do, or tpu_worker.sh."""
    if command[0] != "gcloud":
        return command[0]
    worker = re.search(r"tpu_worker.sh (\w+)", command[-1])
    return worker[1] if worker else command[4]


def done(machine: Machine) -> list[str]:
    return [what(command) for command in machine.commands("gcloud", "tar")]


@pytest.mark.parametrize("options", [[], ["--queued", "--spot", "--project", "p", "--internal-ip", "--delete"]])
def test_does_what_its_dry_run_says(options: list[str], machine: Machine) -> None:
    words = [*UP, *options, "--bucket", "gs://b"]
    dry = machine.dry_run("tpu_pod.sh", *words)
    result = machine.run("tpu_pod.sh", *words, FAKE_CODES="0;0")
    assert result.returncode == 0, result.stderr
    # A queued resource is asked again and again while it waits.
    assert [command for command, _ in groupby(machine.commands("gcloud", "tar", "mkdir"))] == dry
    assert machine.commands("sit") == [["sit", *WORDS]] * 2
    create = next(command for command in dry if what(command) == "create")
    assert ("--spot" in create) == ("--spot" in options)
    if "--queued" in options:
        assert create[3:7] == ["queued-resources", "create", "pod", "--node-id=pod"]
        assert create[-1] == "--runtime-version=v2-alpha-tpuv5-lite"
        assert what(dry[-1]) == "delete"
        assert not (machine.folder / "node").exists()
    else:
        assert create[-2:] == ["--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite"]
        assert "delete" in result.stderr  # The slice still costs money.
        for verb in ("logs", "status", "stop", "delete"):
            dry, before = machine.dry_run("tpu_pod.sh", verb, *POD), len(machine.calls("gcloud"))
            assert machine.run("tpu_pod.sh", verb, *POD).returncode == 0
            assert machine.commands("gcloud")[before:] == dry
        assert shlex.join(dry[0]) == "gcloud compute tpus tpu-vm delete pod --zone=us-west4-a --quiet"


def test_workers_get_the_pinned_requirements(machine: Machine) -> None:
    assert machine.run("tpu_pod.sh", *UP, "--bucket", "b", FAKE_CODES="0 0;0 0").returncode == 0
    jax = next(line for line in pathlib.Path("requirements.txt").read_text().splitlines() if line.startswith("jax=="))
    pip = ["python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installed = machine.commands("python")
    pinned = [*pip, "-r", "requirements.txt", jax.replace("jax", "jax[tpu]")]
    assert installed.count(pinned) == 2
    assert installed.count([*pip, "--no-deps", "--no-build-isolation", "--editable", "."]) == 2
    mounted = machine.commands("gcsfuse")
    assert [command[-2:] for command in mounted] == [["b", "/gcs/b"]] * 2
    # A second run on the same slice installs nothing again.
    assert machine.run("tpu_pod.sh", *UP, FAKE_CODES="0 0;0 0").returncode == 0
    assert machine.commands("python").count(pinned) == 2
    assert done(machine).count("create") == 1


@pytest.mark.parametrize("options", [[], ["--queued", "--spot"]])
def test_preempted_run_goes_on_with_a_new_slice(options: list[str], machine: Machine) -> None:
    (machine.folder / "preempt").touch()
    result = machine.run("tpu_pod.sh", *UP, *options, FAKE_CODES="hang 0;hang 0")
    assert result.returncode == 0, result.stderr
    course = [word for word, _ in groupby(done(machine)) if word not in ("describe", "tar", "ssh", "scp")]
    first = ["create", "install", "start", "follow", "status"]
    assert course == [*first, "delete", *first]
    assert machine.commands("sit") == [["sit", *WORDS]] * 4


@pytest.mark.parametrize(
    ("codes", "starts", "code", "stops"),
    [
        ("75 0;75 0", 2, 0, 0),
        ("1 0;hang 0", 2, 0, 1),  # The one that hangs is ended.
        ("hang 0;137 0", 2, 0, 1),
        ("2;2", 1, 2, 0),
    ],
)
def test_runs_start_again(codes: str, starts: int, code: int, stops: int, machine: Machine) -> None:
    if codes.startswith("hang"):
        (machine.folder / "broken").touch()  # The connection to the log, since that process does not end.
    result = machine.run("tpu_pod.sh", *UP, FAKE_CODES=codes)
    assert result.returncode == code, result.stderr
    assert machine.commands("sit") == [["sit", *WORDS]] * 2 * starts
    assert done(machine).count("stop") == stops
    assert done(machine).count("create") == 1


def test_run_outlives_the_script(machine: Machine) -> None:
    process = machine.start("tpu_pod.sh", *UP, FAKE_CODES="save;save")
    machine.wait_for("save 0", "save 1", "following")
    os.killpg(process.pid, signal.SIGTERM)
    result = machine.finish(process)
    assert result.returncode == 130
    running = machine.run("tpu_pod.sh", "status", *POD).stdout
    assert running.splitlines() == ["slice pod: READY", "exit running", "exit running"]
    # The same command again looks on, and starts nothing.
    (machine.folder / "following").unlink()
    process = machine.start("tpu_pod.sh", *UP, FAKE_CODES="save;save")
    machine.wait_for("following")
    os.killpg(process.pid, signal.SIGTERM)
    assert machine.finish(process).returncode == 130
    assert len(machine.commands("sit")) == 2
    assert machine.run("tpu_pod.sh", "stop", *POD).returncode == 0
    stopped = machine.run("tpu_pod.sh", "status", *POD).stdout
    assert stopped.splitlines() == ["slice pod: READY", "exit 75", "exit 75"]
    assert machine.run("tpu_pod.sh", "delete", *POD).returncode == 0
    assert machine.run("tpu_pod.sh", "status", *POD).stdout == "slice pod: there is none\n"


def test_slice_that_cannot_be_had(machine: Machine) -> None:
    result = machine.run("tpu_pod.sh", *UP, FAKE_CAPACITY="none")
    assert result.returncode == 1
    assert "--queued" in result.stderr
    (machine.folder / "forbidden").touch()
    result = machine.run("tpu_pod.sh", *UP)
    assert result.returncode == 1
    assert "PERMISSION_DENIED" in result.stderr
