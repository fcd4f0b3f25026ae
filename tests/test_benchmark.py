"""`sit benchmark`: the protocol, on contenders whose speed is known, and the command, on tiny models."""

import itertools
import json
import pathlib
import subprocess
import sys
import time

import jax
import pytest
import random_weights
import tiny

from sit_jax.analysis.benchmark import Timed, Times, time_interleaved
from sit_jax.analysis.flops import count_cost
from sit_jax.cli import app as cli
from sit_jax.io.suffixes import STABLEHLO


def test_contenders_alternate_and_their_buffers_rotate() -> None:
    calls: list[tuple[str, int]] = []

    def contender(name: str, seconds: float) -> Timed:
        def run(buffer: int) -> int:
            calls.append((name, buffer))
            time.sleep(seconds)
            return buffer

        return Timed(run, [0, 1, 2])

    times = time_interleaved(
        {"slow": contender("slow", 0.02), "fast": contender("fast", 0.005)}, rounds=3, seconds=0.08
    )
    measured = calls[6:]  # After three calls of each to warm up and to see how long they take.
    assert [name for name, _ in itertools.groupby(name for name, _ in measured)] == ["slow", "fast"] * 3
    assert {buffer for name, buffer in measured if name == "fast"} == {0, 1, 2}
    assert times["fast"].speed_over(times["slow"]) > 1.5
    assert 0.02 <= times["slow"].latency() < 0.2


def test_figures_of_known_times() -> None:
    slow, fast = Times([0.1, 0.2, 0.3, 0.4, 0.5], [4.0, 6.0, 50.0]), Times([], [2.0, 2.0, 10.0])
    assert slow.latency() == pytest.approx(0.3)
    assert [slow.latency(0.1), slow.latency(0.9)] == pytest.approx([0.14, 0.46])
    assert slow.seconds == 6.0
    # A busy moment slows both turns beside it, and leaves their ratio alone.
    assert fast.speed_over(slow) == 3.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("benchmark")
    for name, arch in (("student", tiny.STUDENT), ("teacher", tiny.TEACHER)):
        random_weights.draw(arch).save(root / name)
    return {name: str(root / name) for name in ("student", "teacher")}


def test_command(folders: dict[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, plot = tmp_path / f"US$${STABLEHLO}", tmp_path / "plot.png"  # The plot's text is no formula.
    assert cli.main(["export", folders["student"], str(artifact), "--format", "stablehlo", "--raw_input"]) == 0
    capsys.readouterr()
    words = ["benchmark", folders["student"], str(artifact), "--teacher", folders["teacher"], "--batch_sizes", "1", "3"]
    assert cli.main([*words, "--seconds", "0.02", "--rounds", "2", "--json", "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out)
    names = [folders["teacher"], folders["student"], str(artifact)]
    assert [(row["batch"], row["model"]) for row in result["rows"]] == [(b, n) for b in (1, 3) for n in names]
    costs = [count_cost(tiny.TEACHER).gmac, *[count_cost(tiny.STUDENT).gmac] * 2]
    for row, gmac in zip(result["rows"], costs * 2, strict=True):
        assert row["gmac"] == gmac
        assert row["flops_per_s"] == pytest.approx(2e9 * gmac * row["images_per_s"])
        assert row["peak_share"] == pytest.approx(row["flops_per_s"] / result["product_flops"])
        assert row["gmac_ratio"] == pytest.approx(costs[0] / gmac)
        assert row["speedup_share"] == pytest.approx(row["speedup"] / row["gmac_ratio"])
        weights = sum(x.nbytes for x in jax.tree.leaves(random_weights.draw(tiny.TEACHER).params))
        assert row["memory_mib"] > weights / 2**20 or row["model"] == str(artifact)
        assert row["compile_s"] > 0
    assert [row["speedup"] for row in result["rows"]][::3] == [1.0, 1.0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    words = ["benchmark", folders["teacher"], "--batch_sizes", "2", "--dtype", "bfloat16", "--seconds", "0.02"]
    assert cli.main([*words, "--rounds", "1"]) == 0
    out, progress = capsys.readouterr()
    assert all(text in out for text in ("bfloat16", "x1.00"))
    assert "batch 2: compiling" in progress


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (["sit_tinny"], "sit_tinny: "),
        (["lvvit_tiny", "lvvit_tiny"], "MODEL: "),
        (["README.md"], "README.md: "),
        (["lvvit_tiny", "--plot", "missing/plot.png"], "--plot: missing/plot.png"),
        (["lvvit_tiny", "--plot", "plot.jpg"], "--plot: plot.jpg"),
    ],
)
def test_mistakes(args: list[str], fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", *args]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert fact in error


def test_help_and_the_package_import_nothing_heavy() -> None:
    program = """
import sys
import sit_jax
from sit_jax.cli import app as cli
for words in (["--help"], ["benchmark", "--help"], ["train", "--help"]):
    try:
        cli.main(words)
    except SystemExit:
        pass
heavy = {"jax", "flax", "numpy", "absl", "rich", "orbax", "grain", "tensorflow_datasets", "matplotlib", "pydantic"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
