"""Stands in for gcloud, SLURM and the like in the tests of launch/: notes how it was called, and does as they do.

Called as `python fake_commands.py NAME ARGUMENT ...`; the folder in FAKE holds what it remembers. Workers of a TPU
slice are folders in it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

FOLDER = pathlib.Path(os.environ["FAKE"])
WORKERS = 2


def note(name: str, words: list[str], **more: object) -> None:
    """Appends a call to the log, in one write: several may do so at a time."""
    line = json.dumps({"words": [name, *words], **more}) + "\n"
    with (FOLDER / "log.jsonl").open("a") as file:
        file.write(line)


def fail(message: str) -> int:
    print(f"ERROR: {message}", file=sys.stderr)
    return 1


def gcloud(words: list[str]) -> int:
    note("gcloud", words)
    if (FOLDER / "forbidden").exists():
        return fail("(gcloud) PERMISSION_DENIED")
    group, verb, rest = words[2], words[3], words[4:]
    node, queue = FOLDER / "node", FOLDER / "queue"
    if verb == "describe":
        return describe(node if group == "tpu-vm" else queue)
    if verb in ("create", "start"):
        if os.environ.get("FAKE_CAPACITY") == "none":
            return fail("there is no more capacity in the zone")
        node.write_text("READY")
        if group == "queued-resources":
            # It waits for capacity first.
            queue.write_text("WAITING_FOR_RESOURCES\nACTIVE")
    elif verb == "delete":
        take_away()
        node.unlink(missing_ok=True)
        queue.unlink(missing_ok=True)
    elif verb == "scp":
        for index in range(WORKERS):
            home(index).mkdir(exist_ok=True)
            shutil.copy(rest[0], home(index) / rest[1].partition(":")[2])
    elif verb == "ssh":
        return ssh(rest)
    return 0


def describe(path: pathlib.Path) -> int:
    if not path.exists():
        return fail(f"(gcloud) NOT_FOUND: Resource '{path.name}' was not found")
    state, _, later = path.read_text().partition("\n")
    print(state)
    path.write_text(later or state)
    return 0


def ssh(words: list[str]) -> int:
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    preempt = FOLDER / "preempt"
    if " follow " in options["command"] and preempt.exists():
        preempt.unlink()
        while not all((FOLDER / f"hang {index}").exists() for index in range(WORKERS)):
            time.sleep(0.02)
        take_away()
        (FOLDER / "node").write_text("PREEMPTED")
        if (FOLDER / "queue").exists():
            (FOLDER / "queue").write_text("SUSPENDING\nSUSPENDED")
        return 255
    if (FOLDER / "node").read_text() != "READY":
        return 255
    if " follow " in options["command"]:
        (FOLDER / "following").touch()
        if (FOLDER / "broken").exists():
            return 255
    chosen = range(WORKERS) if options["worker"] == "all" else [int(options["worker"])]
    processes = []
    for index in chosen:
        home(index).mkdir(exist_ok=True)
        variables = {
            **os.environ,
            "HOME": str(home(index)),
            "PATH": f"{FOLDER}/worker:{os.environ['FAKE_PATH']}",
            "FAKE_INDEX": str(index),
        }
        processes.append(subprocess.Popen(["bash", "-c", options["command"]], cwd=home(index), env=variables))
    return max(process.wait() for process in processes)


def home(index: int) -> pathlib.Path:
    return FOLDER / f"home {index}"


def take_away() -> None:
    """The workers vanish, and what runs on them."""
    for index in range(WORKERS):
        pid = home(index) / "sit_jax" / "state" / "pid"
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(home(index), ignore_errors=True)


def srun(words: list[str]) -> int:
    note("srun", words, local_devices=os.environ.get("JAX_LOCAL_DEVICE_IDS"))
    command = words[next(i for i, word in enumerate(words) if not word.startswith("-")) :]
    tasks = []
    for index in range(int(os.environ["SLURM_NTASKS"])):
        tasks.append(subprocess.Popen(command, env={**os.environ, "FAKE_INDEX": str(index)}))
    (FOLDER / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    failed = False
    while any(task.poll() is None for task in tasks):
        if not failed and any(task.poll() for task in tasks):
            failed = True
            for task in tasks:
                task.terminate()
        time.sleep(0.02)
    (FOLDER / "tasks").unlink()
    # A signal's number comes as 128 and that.
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scancel(words: list[str]) -> int:
    note("scancel", words)
    for pid in (FOLDER / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    return 0


def squeue(words: list[str]) -> int:
    print(os.environ.get("FAKE_JOB_STATE", "RUNNING"))
    return 0


def kubectl(words: list[str]) -> int:
    note("kubectl", words, stdin=sys.stdin.read())
    return 0


def sit(words: list[str]) -> int:
    """Ends with the next of this process's codes.

    `hang` ends by signals only, `save` with 75 where it is told to end, `deaf` when it is killed.
    """
    index = os.environ.get("FAKE_INDEX", "0")
    if "--process_id" in words:
        index = words[words.index("--process_id") + 1]
    note("sit", words, process=int(index), gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    plans = [plan.split() for plan in os.environ["FAKE_CODES"].split(";")]
    counter = FOLDER / f"starts {index}"
    start = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(start + 1))
    code = plans[int(index)][start]
    if not code.isdigit():
        if code != "hang":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75) if code == "save" else None)
        (FOLDER / f"{code} {index}").touch()
        time.sleep(60)
        return 1
    # A process that ends does so after the others have started to wait.
    for other, plan in enumerate(plans):
        while not plan[start].isdigit() and not (FOLDER / f"{plan[start]} {other}").exists():
            time.sleep(0.02)
    return int(code)


def python(words: list[str]) -> int:
    """A worker's Python: makes a virtual environment of two fakes, and installs nothing."""
    note("python", words)
    if words[:2] == ["-m", "venv"]:
        binaries = pathlib.Path(words[2], "bin")
        binaries.mkdir(parents=True)
        for name in ("python", "sit"):
            shutil.copy(FOLDER / "worker" / f"fake-{name}", binaries / name)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "gcloud": gcloud, "srun": srun, "scancel": scancel, "squeue": squeue, "kubectl": kubectl, "sit": sit,
    "python": python, "mountpoint": lambda words: 1,
}  # fmt: skip


def run(name: str, words: list[str]) -> int:
    """Runs a fake; of other commands tar and mkdir are the real ones, and the rest do nothing."""
    if name in COMMANDS:
        return COMMANDS[name](words)
    note(name, words)
    if name not in ("tar", "mkdir"):
        return 0
    return subprocess.run([name, *words], env={**os.environ, "PATH": os.environ["FAKE_PATH"]}).returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
