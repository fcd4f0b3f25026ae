"""The manifest for Kubernetes: as it is written, and as launch/kubernetes.sh fills it in."""

import os
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import yaml
from launch_machine import Machine
from test_distributed import free_port

from sit_jax.cli import app as cli
from sit_jax.errors import PreemptedError, UserError

MANIFEST = pathlib.Path("launch/kubernetes.yaml")
AWKWARD = '/data/my "run" \\ $(HOME) it\'s & more # --name'
RUN = ("--image", "registry.io/me/sit:1.0", "--config", "configs/digits.py", "--workdir", AWKWARD)


def manifest(machine: Machine, *words: str) -> str:
    """What a dry run would hand to kubectl; the real one must hand it the same."""
    result = machine.run("kubernetes.sh", *RUN, *words, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert machine.calls() == []
    command, _, text = result.stdout.partition(" <<'END'\n")
    assert text.endswith("\nEND\n")
    assert machine.run("kubernetes.sh", *RUN, *words).returncode == 0
    (call,) = machine.calls()
    assert call["words"] == shlex.split(command)
    assert call["stdin"] == text.removesuffix("END\n")
    return str(call["stdin"])


def check(text: str, name: str, workers: int, processes: bool) -> tuple[Any, Any, Any]:
    """Checks how pods find one another and are started again; returns the job, its pod and the pod's container."""
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == job["metadata"]["name"] == pod["subdomain"] == name
    assert service["spec"] == {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}}
    spec = job["spec"]
    assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    assert spec["completions"] == spec["parallelism"] == workers
    (container,) = pod["containers"]
    rules = spec["podFailurePolicy"]["rules"]
    for action, code in (("FailJob", UserError.exit_code), ("Ignore", PreemptedError.exit_code)):
        codes = {"containerName": container["name"], "operator": "In", "values": [code]}
        assert {"action": action, "onExitCodes": codes} in rules
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    # Kubernetes puts a number in place of the variable before sit sees it.
    given = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    arguments, rest = cli.make_parser().parse_known_args(given)
    assert arguments.resume
    assert all(word.startswith("--config.") for word in rest)
    if processes:
        assert arguments.coordinator == f"{name}-0.{name}:12345"
        assert arguments.num_processes == workers
        words = container["args"]
        assert words[words.index("--process_id") :] == ["--process_id", "$(JOB_COMPLETION_INDEX)"]
    (meet,) = pod["initContainers"]
    variables = {entry["name"]: entry["value"] for entry in meet["env"]}
    assert variables == {"MEET_AT": f"{name}-0.{name}:12344", "WORKERS": str(workers)}
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    return job, pod, container


def test_filled_in(machine: Machine) -> None:
    words = ["--name", "my-run", "--workers", "4", "--gpus", "2", "--claim", "disk", "--namespace", "team"]
    text = manifest(machine, *words, "--config.data.data_dir=/data/it's")
    _, pod, container = check(text, "my-run", 4, processes=True)
    train = ["train", "--config", "configs/digits.py", "--workdir", AWKWARD.replace("$(", "$$("), "--resume"]
    assert container["args"][:7] == [*train, "--config.data.data_dir=/data/it's"]
    assert container["image"] == "registry.io/me/sit:1.0"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert container["volumeMounts"][0]["mountPath"] == "/data"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert "--namespace=team" in machine.commands("kubectl")[0]


def test_on_gke(machine: Machine) -> None:
    words = ["--workers", "4", "--tpu", "tpu-v6e-slice", "--topology", "2x8", "--chips", "4"]
    words += ["--bucket", "gs://pictures", "--account", "writer", "--workdir", "/gcs/pictures/run"]
    job, pod, container = check(manifest(machine, *words), "sit", 4, processes=False)
    assert not any(word.startswith("--coordinator") for word in container["args"])  # GKE and JAX know.
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "2x8",
    }
    assert container["volumeMounts"][0]["mountPath"] == "/gcs/pictures"
    assert "persistentVolumeClaim" not in pod["volumes"][0]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "pictures"
    assert pod["serviceAccountName"] == "writer"
    assert job["spec"]["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_as_it_is_written_its_pods_meet_before_they_start() -> None:
    _, pod, container = check(MANIFEST.read_text(), "sit", 2, processes=True)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pathlib.Path(container["args"][2]).exists()
    program = pod["initContainers"][0]["command"]
    place = f"localhost:{free_port()}"
    pods = []
    for index in (1, 0):
        variables = {"MEET_AT": place, "WORKERS": "2", "JOB_COMPLETION_INDEX": str(index)}
        pods.append(subprocess.Popen([sys.executable, *program[1:]], env={**os.environ, **variables}))
    assert [process.wait(timeout=60) for process in pods] == [0, 0]
