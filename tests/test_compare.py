"""`sit compare`: its sweep, its trainings, its table and its page."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import own_reducers
import psutil
import pytest

import sit_jax
from sit_jax.analysis.compare import pareto_front
from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.jobs import LOG, Job, devices_of_slots, run_jobs
from sit_jax.cli import app as cli
from sit_jax.cli.config_file import load_config
from sit_jax.config import Reported, Sweep
from sit_jax.config.files import get_sweep
from sit_jax.errors import ConfigError, PreemptedError
from sit_jax.training.evaluate import evaluate_model

OWN = "own_reducers:First"
(PAGE,) = re.findall(r"```python\n(.*?)```", pathlib.Path("docs/compare.md").read_text(), re.DOTALL)
SHAPE = {"stem": "patch", "image_size": 32, "dim": 16, "depth": 2, "num_heads": 2}
RECIPE: dict[str, Any] = {f"{part}model.{name}": value for part in ("", "teacher.") for name, value in SHAPE.items()}
RECIPE |= {"model.stage_blocks": "(1,1)", "data.train_split": "train[:256]", "data.eval_split": "test[:96]"}
RECIPE |= {f"{part}{key}": value for part in ("", "teacher.") for key, value in {"epochs": 1, "batch_size": 64}.items()}
RECIPE |= {"optim.warmup_epochs": 0.0, "teacher.optim.warmup_epochs": 0.0, "log.tensorboard": False}
SWEEP = ["--reducers", "slim", OWN, "--keep_ratios", "0.5", "--objectives", "frd", "untrained", "--seeds", "0"]


def words(page: pathlib.Path, workdir: pathlib.Path, data: str) -> list[str]:
    recipe = [f"--config.{key}={value}" for key, value in {**RECIPE, "data.data_dir": data}.items()]
    return ["compare", "--config", str(page), "--workdir", str(workdir), "--seconds", "0.02", *SWEEP, *recipe]


def result_of(workdir: pathlib.Path) -> dict[str, Any]:
    """The contents of compare.json, without what is measured by a clock."""
    result: dict[str, Any] = json.loads((workdir / "compare.json").read_text())
    for line in (result["teacher"], *result["rows"]):
        assert all(speed > 0 for speed in line.pop("images_per_s").values())
    return {key: value for key, value in result.items() if key not in ("measured", "page")}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The config file that docs/compare.md shows."""
    path = tmp_path_factory.mktemp("page") / "my_sweep.py"
    path.write_text(PAGE)
    return path


@pytest.fixture(scope="module")
def python_path() -> Any:
    """Child processes find the reducers of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{os.getcwd()}:{os.getcwd()}/tests")
        yield


@pytest.fixture(scope="module")
def compared(
    page: pathlib.Path, digits_dir: str, python_path: None, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The folder of a comparison."""
    workdir = tmp_path_factory.mktemp("compare") / "w"
    assert cli.main(words(page, workdir, digits_dir)) == 0
    return workdir


def test_rows_are_what_the_models_are(compared: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((compared / "compare.json").read_text())
    rows = {(row["reducer"], row["objective"]): row for row in result["rows"]}
    assert set(rows) == {("slim", "frd"), (OWN, "frd"), (OWN, "untrained")}
    assert [note.split(":")[0] for note in result["notes"]] == ["slim"]
    for reducer in ("slim", OWN):
        run = compared / f"{reducer.replace(':', '-')}_0.5_frd_0"
        assert cli.main(["evaluate", str(run), "--json"]) == 0
        row = rows[reducer, "frd"]
        assert row["seeds"] == {"0": json.loads(capsys.readouterr().out)["top1"]}
        assert row["top1"] == row["least"] == row["most"] == row["seeds"]["0"]
        assert row["gmac"] == count_cost(sit_jax.load(run).vit).gmac
        assert (row["keep_ratio"], row["tokens"]) == (0.5, [4, 2])
    teacher = sit_jax.load(compared / "teacher")
    assert result["teacher"]["gmac"] == count_cost(teacher.vit).gmac > rows["slim", "frd"]["gmac"]
    assert result["teacher"]["top1"] == evaluate_model(teacher)["top1"]
    untrained = sit_jax.slim(teacher, keep_ratio=0.5, after=(1,), reducer=OWN)
    assert rows[OWN, "untrained"]["top1"] == evaluate_model(untrained, teacher.data)["top1"]


def test_complete_trainings_are_not_repeated(
    compared: pathlib.Path,
    page: pathlib.Path,
    digits_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, changed = result_of(compared), (compared / "compare.json").stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "Popen", None)  # No child process can start.
    assert cli.main(words(page, compared, digits_dir)) == 0
    assert result_of(compared) == before
    assert (compared / "compare.json").stat().st_mtime_ns > changed
    table = capsys.readouterr().out
    assert table.count(f"{before['teacher']['top1']:.2%}") >= 1
    assert re.search(r"own_reducers:First +0\.5 +untrained ", table)
    # Another recipe is refused, before anything runs.
    assert cli.main([*words(page, compared, digits_dir), "--config.optim.lr=0.5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "optim.lr" in line


def test_page(compared: pathlib.Path) -> None:
    index = compared / "index.html"
    first = index.read_text()
    assert not re.search(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//", first)
    assert re.findall(r'<th scope="row">([^<]+)</th>', first) == ["teacher", "slim", OWN, OWN]
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', first, re.DOTALL)[0])
    assert set(figures) == {"cost", "speed-1", "speed-64"}
    shapes = {trace["name"]: trace["marker"]["symbol"] for trace in figures["cost"]["data"]}
    assert len({shapes[name] for name in ("slim, frd", f"{OWN}, frd", f"{OWN}, untrained", "teacher")}) == 4
    index.unlink()
    assert cli.main(["report", str(compared)]) == 0
    remove_time = re.compile(r"<time>.*?</time>")
    assert remove_time.sub("", index.read_text()) == remove_time.sub("", first)
    # The report of one of its runs links to it.
    assert cli.main(["report", "--no_model", str(compared / "slim_0.5_frd_0")]) == 0
    assert '<a href="../index.html">' in (compared / "slim_0.5_frd_0" / "report.html").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda result: result["teacher"].update(gmac="x"),
        lambda result: result["teacher"].update(gmac=0),
        lambda result: result["teacher"].update(images_per_s=[1]),
        lambda result: result["rows"][0].update(top1="y"),
        lambda result: result["rows"][0].pop("tokens"),
        lambda result: result.update(failed=["x"]),
        lambda result: result.update(rows=7),
    ],
)
def test_a_damaged_result(
    compared: pathlib.Path, damage: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((compared / "compare.json").read_text())
    damage(result)
    (tmp_path / "compare.json").write_text(json.dumps(result))
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "compare.json" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "index.html").exists()


def test_a_training_that_fails(
    compared: pathlib.Path,
    page: pathlib.Path,
    digits_dir: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(compared, moved)
    shutil.rmtree(moved / "slim_0.5_frd_0")
    (moved / "slim_0.5_frd_0" / "checkpoints").mkdir(parents=True)  # `sit train` refuses such a folder.
    assert cli.main(words(page, moved, digits_dir)) == 1
    log = moved / "slim_0.5_frd_0" / LOG
    assert str(log) in capsys.readouterr().err.splitlines()[-1]
    assert "holds checkpoints but no config.json" in log.read_text()
    result, before = result_of(moved), result_of(compared)
    assert [entry["name"] for entry in result["failed"]] == ["slim_0.5_frd_0"]
    assert [row["top1"] for row in result["rows"]] == [
        row["top1"] if row["reducer"] == OWN else None for row in before["rows"]
    ]
    assert "slim_0.5_frd_0 failed" in (moved / "index.html").read_text()


def test_points_of_an_objective(page: pathlib.Path) -> None:
    sweep = get_sweep(str(page))
    assert len(sweep.points) == 3 * 2 * (3 + 3 + 1)
    assert len({point.name for point in sweep.points}) == len(sweep.points)
    configs = {point: load_config(str(page), point.overrides) for point in sweep.points}
    for point, config in configs.items():
        arch = config.model.architecture
        assert isinstance(arch, sit_jax.Architecture)
        assert (arch.reducer, arch.keep_ratio) == (point.reducer, point.keep_ratio)
        assert config.seed == (point.seed or 0)
        assert config.loss.needs_teacher == (point.objective != "ce")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"reducers": ()}, "reducers"),
        ({"reducers": "slim"}, "reducers"),
        ({"reducers": ("own:A", "own-A")}, "reducers"),
        ({"keep_ratios": (0.5, 1.0)}, "keep_ratios"),
        ({"keep_ratios": (0.5, 0.5)}, "keep_ratios"),
        ({"objectives": ("kd",)}, "objectives"),
        ({"seeds": (-1,)}, "seeds"),
        ({"seeds": 0}, "seeds"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"reported": (("EViT", 3.0, 0.795),)}, "reported"),
        ({"reported": (Reported("EViT", 3.0, 79.5),)}, "reported"),
    ],
)
def test_sweeps_that_are_wrong(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Sweep(**{"reducers": ("slim",), "keep_ratios": (0.5,), **changes})
    assert raised.value.key == key


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--config digits", "get_sweep"),
        ("--config PAGE --config.model.reducer=slim", "--reducers"),
        ("--config PAGE --config.model.kept_tokens=(16,8,4,2)", "model.kept_tokens: "),
        ("--config PAGE --config.model.kept_tokens_choices=((16,8,4,2),(16,4,2,1))", "model.kept_tokens_choices: "),
        ("--config PAGE --config.seed=7", "--seeds"),
        ("--config PAGE --reducers slm", "'slm'"),
        ("--config PAGE --keep_ratios 0.1", "keep_ratio"),
        ("--config PAGE --seeds 1 1", "seeds"),
        ("--config PAGE --reducers slim --objectives untrained", "objectives"),
        ("--config PAGE --config.model.distillation_token --reducers topk --objectives untrained", "objectives"),
        ("--config PAGE --config.teacher.run=none", "teacher.run"),
        ("--config PAGE --config.teacher=None --config.loss.token=0 --config.loss.logits=0", "teacher"),
    ],
)  # fmt: skip
def test_arguments_that_are_wrong(
    arguments: str, named: str, page: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", *arguments.replace("PAGE", str(page)).split(), "--workdir", str(tmp_path / "w")]
    assert cli.main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sit compare: ")
    assert named in line
    assert not (tmp_path / "w").exists()


def test_a_cnn_teacher(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "hard.py"
    hard = "config = sit_jax.get_config('digits')\n    config.cnn_teacher = config.teacher\n    config.loss.hard = 1"
    page.write_text(PAGE.replace('return sit_jax.get_config("digits")', f"{hard}\n    return config"))
    words = [f"--config.{part}model.distillation_token" for part in ("", "teacher.")]
    for point in get_sweep(str(page)).points:
        alone = load_config(str(page), [*words, *point.overrides])
        assert (alone.loss.hard == 0) == (point.objective == "ce")
    assert cli.main(["compare", "--config", str(page), "--workdir", str(tmp_path / "w"), *words]) == 2
    assert "cnn_teacher.run" in capsys.readouterr().err.splitlines()[-1]


def test_front() -> None:
    points = [(1.0, 0.7), (2.0, 0.8), (2.0, 0.75), (3.0, 0.8), (4.0, None), (0.5, 0.1)]
    assert pareto_front(points) == [True, True, False, False, False, True]
    assert pareto_front(points, more_is_better=True) == [False, False, False, True, False, False]


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_of_slots(2, tmp_path) == [None, None]
    (tmp_path / "accel0").touch()
    with pytest.raises(ConfigError):
        devices_of_slots(2, tmp_path)
    for name in ("nvidiactl", "nvidia10", "nvidia9"):
        (tmp_path / name).touch()
    assert devices_of_slots(2, tmp_path) == ["9", "10"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert devices_of_slots(1) == [None]
    assert devices_of_slots(2) == ["4", "6"]
    with pytest.raises(ConfigError) as raised:
        devices_of_slots(4)
    assert raised.value.key == "--parallel"


def test_counting_opens_no_device() -> None:
    program = f"""
from jax._src import xla_bridge
from sit_jax.analysis.flops import count_cost
from sit_jax.models.architecture import Architecture
assert count_cost(Architecture(depth=2, stage_blocks=(1, 1), keep_ratio=0.5, reducer={OWN!r})).gmac > 0
assert not xla_bridge.backends_are_initialized()
"""
    environment = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{os.path.dirname(own_reducers.__file__)}"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_signal_ends_the_children(tmp_path: pathlib.Path) -> None:
    (tmp_path / "sleepy.py").write_text("import time; time.sleep(600)")
    command = ["train", "--config", str(tmp_path / "sleepy.py")]
    jobs = [Job(name, tmp_path / name, command, lambda: None) for name in ("a", "b", "c")]
    before = set(psutil.Process().children())  # Helpers of Python that other tests have started.

    def stop() -> None:
        while len(set(psutil.Process().children()) - before) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(PreemptedError):
        run_jobs(jobs, [None, None])
    thread.join()
    assert set(psutil.Process().children()) <= before
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_killed_again_and_again(
    compared: pathlib.Path, page: pathlib.Path, digits_dir: str, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "w"
    own = workdir / "own_reducers-First_0.5_frd_0"
    command = [sys.executable, "-m", "sit_jax", *words(page, workdir, digits_dir)]

    def kill(begun: pathlib.Path, with_children: bool) -> None:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 600
            while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children if with_children else ():
                child.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL

    kill(workdir / "slim_0.5_frd_0" / LOG, with_children=False)  # The training goes on, and is waited for.
    kill(own / "config.json", with_children=True)
    done = subprocess.run([*command, "--parallel", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert result_of(workdir) == result_of(compared)
    trained = (workdir / "slim_0.5_frd_0" / LOG).read_text()
    assert trained.count("student: epoch 1 ") == 1  # Not trained again.
