"""A machine on which the launch scripts find fakes instead of gcloud, SLURM and the like (see fake_commands.py)."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

FAKES = pathlib.Path("tests/fake_commands.py").absolute()
# Commands by folder, each with its fake unless that has the same name.
COMMANDS = {
    "bin": "gcloud srun scancel squeue scontrol kubectl docker sit tar mkdir",
    "worker": "sudo gcsfuse mountpoint python3.13=python fake-python=python fake-sit=sit",
}


class Machine:
    """A folder with fakes, and what they noted."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        for place, names in COMMANDS.items():
            (folder / place).mkdir(parents=True)
            for entry in names.split():
                name, _, fake = entry.partition("=")
                path, command = folder / place / name, f"{sys.executable} -S -E {shlex.quote(str(FAKES))}"
                path.write_text(f'#!/bin/sh\nexec {command} {fake or name} "$@"\n')
                path.chmod(0o755)
        self.sit = str(folder / "bin" / "sit")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))},
            "SLURM_SUBMIT_DIR": os.getcwd(),
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "FAKE": str(folder),
            "FAKE_PATH": os.environ["PATH"],
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(self, script: str, *words: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", f"launch/{script}", *words],
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return self.finish(self.start(script, *words, **variables), timeout=300)

    def finish(self, process: "subprocess.Popen[str]", timeout: float = 20) -> "subprocess.CompletedProcess[str]":
        printed, errors = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)

    def dry_run(self, script: str, *words: str, **variables: str) -> list[list[str]]:
        """The commands that a dry run prints; it must run none."""
        before = self.calls()
        result = self.run(script, *words, "--dry-run", **variables)
        assert result.returncode == 0, result.stderr
        assert self.calls() == before
        return [shlex.split(line) for line in result.stdout.splitlines()]

    def calls(self, *names: str) -> list[dict[str, Any]]:
        """What was noted of these commands, or of all, oldest first."""
        log = self.folder / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if not names or line["words"][0] in names]

    def commands(self, *names: str) -> list[list[str]]:
        return [call["words"] for call in self.calls(*names)]

    def wait_for(self, *names: str) -> None:
        """Waits until files are there."""
        deadline = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names} are not there"
            time.sleep(0.02)
