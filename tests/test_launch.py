"""The launch scripts on one machine: what they would do, what they do, and how they end and go on."""

import os
import pathlib
import re
import shlex
import signal
import time

import pytest
from launch_machine import Machine

SCRIPTS = ["tpu_pod.sh", "slurm.sbatch", "gpu_node.sh", "kubernetes.sh", "image.sh"]
RUN = ("--config", "configs/digits.py", "--workdir", "runs/it's my run", "--config.epochs=3")
WORDS = ["train", "--config", "configs/digits.py", "--workdir", "runs/it's my run", "--resume", "--config.epochs=3"]
SLURM = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2"}
QUICK = ("--pause", "0")


@pytest.mark.parametrize("script", [*SCRIPTS, "tpu_worker.sh", "slurm_task.sh"])
def test_help(script: str, machine: Machine) -> None:
    assert os.access(f"launch/{script}", os.X_OK)
    result = machine.run(script, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: ")
    # Every option that is listed is known: another mistake ends the script.
    verb = ["up"] if script == "tpu_pod.sh" else []
    for option in re.findall(r"^  (--[a-z-]+)", result.stdout, re.MULTILINE):
        if option not in ("--help", "--push", "--dry-run"):
            refused = machine.run(script, *verb, option)
            assert (refused.returncode, refused.stdout) == (2, ""), option
            assert "unknown option" not in refused.stderr


CONFIG = "--config configs/digits.py --workdir w"
IN_PODS = "--image i --config configs/digits.py --workdir"


@pytest.mark.parametrize(
    ("script", "words", "named"),
    [
        ("gpu_node.sh", "", "--config"),
        ("gpu_node.sh", "--config none.py --workdir w", "none.py"),
        ("gpu_node.sh", "--config configs/digits.py --workdir gs://b/w", "gs://b/w"),
        ("gpu_node.sh", f"{CONFIG} --config.data.data_dir=gs://b", "mount the bucket"),
        ("gpu_node.sh", f"{CONFIG} --config.epochs 3", "--config.KEY=VALUE"),
        ("gpu_node.sh", f"{CONFIG} --gpus x", "--gpus: must be an integer"),
        ("gpu_node.sh", f"{CONFIG} --gpus", "--gpus needs a value"),
        ("gpu_node.sh", f"{CONFIG} --gpus 1 --sit none", "--sit: there is no command none"),
        ("gpu_node.sh", "--wrong", "--wrong"),
        ("slurm.sbatch", CONFIG, "sbatch"),
        ("tpu_pod.sh", "", "up, logs, status, stop or delete"),
        ("tpu_pod.sh", "up --zone z", "--name"),
        ("tpu_pod.sh", "up --name n --zone z", "--type"),
        ("tpu_pod.sh", "up --name n --zone z --type v4-8 --config ../x/configs/digits.py --workdir w", "../x/configs"),
        ("kubernetes.sh", f"{IN_PODS} runs/w", "/data"),
        ("kubernetes.sh", f"{IN_PODS} /data/w --tpu t", "--topology"),
        ("kubernetes.sh", f"{IN_PODS} /data/w --name A", "--name"),
        ("image.sh", "--accelerator rocm", "cpu, cuda13 or tpu, not 'rocm'"),
    ],
)
def test_mistakes_are_one_line(script: str, words: str, named: str, machine: Machine) -> None:
    result = machine.run(script, *words.split())
    (line,) = result.stderr.splitlines()
    assert (result.returncode, result.stdout, machine.calls()) == (2, "", [])
    assert named in line


@pytest.mark.parametrize("per_gpu", [True, False])
def test_gpu_node_does_what_its_dry_run_says(per_gpu: bool, machine: Machine) -> None:
    words = [*RUN, "--gpus", "2", "--sit", machine.sit, *["--per-gpu"] * per_gpu]
    dry = machine.dry_run("gpu_node.sh", *words)
    together = ["--coordinator", "localhost:12345", "--num_processes", "2", "--process_id"]
    processes = [("0", [*together, "0"]), ("1", [*together, "1"])] if per_gpu else [("0,1", [])]
    assert dry == [["env", f"CUDA_VISIBLE_DEVICES={gpus}", machine.sit, *WORDS, *more] for gpus, more in processes]
    assert machine.run("gpu_node.sh", *words, FAKE_CODES="0;0").returncode == 0
    calls = machine.calls("sit")
    assert sorted(["env", f"CUDA_VISIBLE_DEVICES={c['gpus']}", machine.sit, *c["words"][1:]] for c in calls) == dry


def test_gpu_node_takes_the_gpus_it_is_given(machine: Machine) -> None:
    def devices(*words: str, **variables: str) -> list[str]:
        return [line[1] for line in machine.dry_run("gpu_node.sh", *RUN, "--per-gpu", *words, **variables)]

    assert devices(CUDA_VISIBLE_DEVICES="3,5") == ["CUDA_VISIBLE_DEVICES=3", "CUDA_VISIBLE_DEVICES=5"]
    assert devices("--gpus", "1", CUDA_VISIBLE_DEVICES="3,5") == ["CUDA_VISIBLE_DEVICES=3"]
    listing = machine.folder / "bin" / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: a)'\necho 'GPU 1: B (UUID: b)'\n")
    listing.chmod(0o755)
    assert devices() == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        ("75 75 0", 3, 0),  # Stopped by a signal: without a limit.
        ("1 1 4 0", 3, 4),  # A crash: three starts in all.
        ("2", 1, 2),  # A user error.
    ],
)
def test_runs_start_again(codes: str, starts: int, code: int, machine: Machine) -> None:
    result = machine.run("gpu_node.sh", *RUN, *QUICK, "--gpus", "1", "--sit", machine.sit, FAKE_CODES=codes)
    assert result.returncode == code, result.stderr
    assert machine.commands("sit") == [["sit", *WORDS]] * starts


def test_crash_of_one_process_ends_the_others_at_once(machine: Machine) -> None:
    words = [*RUN, *QUICK, "--gpus", "2", "--per-gpu", "--sit", machine.sit]
    begun = time.monotonic()
    assert machine.run("gpu_node.sh", *words, FAKE_CODES="hang 0;1 0").returncode == 0
    assert time.monotonic() - begun < 5  # Not after their 60 seconds, nor after the 5 until SIGKILL.
    assert len(machine.commands("sit")) == 4


def test_gpu_node_lets_the_run_save(machine: Machine) -> None:
    words = [*RUN, "--gpus", "2", "--per-gpu", "--sit", machine.sit]
    process = machine.start("gpu_node.sh", *words, FAKE_CODES="save;save")
    machine.wait_for("save 0", "save 1")
    process.send_signal(signal.SIGTERM)
    assert machine.finish(process).returncode == 75
    assert len(machine.commands("sit")) == 2
    # A process that does not end is killed.
    process = machine.start("gpu_node.sh", *words, "--grace", "1", FAKE_CODES="0 deaf;0 deaf")
    machine.wait_for("deaf 0", "deaf 1")
    process.send_signal(signal.SIGTERM)
    assert machine.finish(process).returncode == 137


def test_slurm_does_what_its_dry_run_says(machine: Machine) -> None:
    words = [*RUN, "--sit", machine.sit]
    variables = {**SLURM, "SLURM_CPUS_PER_TASK": "4"}
    task = str(pathlib.Path("launch/slurm_task.sh").absolute())
    srun = ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=4", task, machine.sit, *WORDS]
    assert machine.dry_run("slurm.sbatch", *words, **variables) == [srun]
    assert machine.run("slurm.sbatch", *words, FAKE_CODES="0 0;0 0", **variables).returncode == 0
    assert machine.commands("srun") == [srun]
    assert machine.commands("sit") == [["sit", *WORDS]] * 2
    assert machine.commands("scontrol") == []
    # A task that is alone on its node has all GPUs.
    variables |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}
    devices = ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"]
    assert machine.dry_run("slurm.sbatch", *words, **variables) == [[*devices, *srun]]
    assert machine.run("slurm.sbatch", *words, FAKE_CODES="0 0;0 0", **variables).returncode == 0
    assert [call["local_devices"] for call in machine.calls("srun")] == [None, "0,1,2,3"]


@pytest.mark.parametrize(
    ("codes", "state", "starts", "code", "requeued"),
    [
        ("75;75", "RUNNING", 1, 75, True),
        ("75;75", "COMPLETING", 1, 75, False),  # Somebody cancelled it.
        ("1 0;hang 0", "RUNNING", 2, 0, False),  # After a crash it starts again within the job.
        ("2;hang", "RUNNING", 1, 2, False),
    ],
)
def test_slurm_goes_on(codes: str, state: str, starts: int, code: int, requeued: bool, machine: Machine) -> None:
    words = [*RUN, *QUICK, "--sit", machine.sit]
    result = machine.run("slurm.sbatch", *words, FAKE_CODES=codes, FAKE_JOB_STATE=state, **SLURM)
    assert result.returncode == code, result.stderr
    assert len(machine.commands("srun")) == starts
    assert machine.commands("scontrol") == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_slurm_hands_the_signal_on(machine: Machine) -> None:
    process = machine.start("slurm.sbatch", *RUN, "--sit", machine.sit, FAKE_CODES="save;save", **SLURM)
    machine.wait_for("save 0", "save 1", "tasks")
    process.send_signal(signal.SIGTERM)
    assert machine.finish(process).returncode == 75
    assert machine.commands("scancel") == [["scancel", "--signal=TERM", "17"]]
    assert machine.commands("scontrol") == [["scontrol", "requeue", "17"]]


def test_sbatch_options() -> None:
    lines = pathlib.Path("launch/slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    # SLURM stops reading at the first command, and tells the shell (B) in time for saving.
    assert [line.startswith("#") for line in lines].index(False) > lines.index(f"#SBATCH {options[-1]}")
    assert "--signal=B:TERM@120" in options
    assert "--requeue" in options


def test_image(machine: Machine) -> None:
    words = ["--accelerator", "tpu", "--tag", "registry/sit:1", "--push"]
    dry = machine.dry_run("image.sh", *words)
    assert machine.run("image.sh", *words).returncode == 0
    assert machine.commands("docker") == dry
    assert dry[0][:3] == ["docker", "build", "--file=launch/Dockerfile"]
    assert dry[1] == ["docker", "push", "registry/sit:1"]


def test_dockerfile_copies_what_is_there() -> None:
    lines = pathlib.Path("launch/Dockerfile").read_text().splitlines()
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    ignored = pathlib.Path(".dockerignore").read_text().splitlines()
    assert sorted(sources) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert "*" in ignored  # All else stays out: .git, .venv, runs.
    assert all(pathlib.Path(source).exists() for source in sources)
    assert lines.index("USER sit") < lines.index('ENTRYPOINT ["sit"]')


@pytest.mark.parametrize("page", ["launch/README.md", "docs/training.md"])
def test_commands_of_the_pages(page: str, machine: Machine) -> None:
    seen = set()
    blocks = re.findall(r"```sh\n(.*?)```", pathlib.Path(page).read_text(), re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        at = next((index for index, word in enumerate(words) if word.startswith("launch/")), None)
        if at is None:
            continue
        script = words[at].removeprefix("launch/")
        seen.add(script)
        options = [word for word in words[at + 1 :] if word != "--dry-run"]
        result = machine.run(script, *options, "--dry-run", CUDA_VISIBLE_DEVICES="0,1")
        assert result.returncode == 0, (words, result.stderr)
        assert result.stdout
    assert seen == set(SCRIPTS) - (set() if page.startswith("launch") else {"image.sh"})


def test_readme_names_the_pinned_jax() -> None:
    jax = next(line for line in pathlib.Path("requirements.txt").read_text().splitlines() if line.startswith("jax=="))
    named = re.findall(r"jax\[[a-z0-9]+\](==[\d.]+)", pathlib.Path("launch/README.md").read_text())
    assert named == [jax.removeprefix("jax")]
