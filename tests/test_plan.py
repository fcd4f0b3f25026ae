"""Planning: what a compiled program's text says, chips and slices, and the command on virtual devices and for TPUs."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

import jax
import pytest
import tiny

from sit_jax.analysis import plan as planning
from sit_jax.analysis.chips import CHIPS, parse_topology
from sit_jax.analysis.flops import count_step_macs
from sit_jax.analysis.hlo import Collective, Traffic, read_traffic
from sit_jax.analysis.plan import Bound, plan
from sit_jax.analysis.plan_table import print_plan
from sit_jax.cli import app as cli
from sit_jax.config import Config, LossConfig, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.errors import ConfigError
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding

# A loop that runs five times around a kernel that reads one slice of a stack, an all-reduce over pairs, and a gather.
PROGRAM = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%a, %b)
}

%fused (p: f32[5,4,8], q: s32[]) -> f32[4,8] {
  %p = f32[5,4,8]{2,1,0} parameter(0)
  %q = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,4,8]{2,1,0} dynamic-slice(%p, %q, %zero, %zero), dynamic_slice_sizes={1,4,8}
}

%body (t: (s32[], f32[5,4,8], f32[4,8])) -> (s32[], f32[5,4,8], f32[4,8]) {
  %t = (s32[], f32[5,4,8]{2,1,0}, f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %stack = f32[5,4,8]{2,1,0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %layer = f32[4,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%layer), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%sum
  ROOT %out = (s32[], f32[5,4,8]{2,1,0}, f32[4,8]{1,0}) tuple(%next, %stack, %all-reduce.1)
}

%condition (c: (s32[], f32[5,4,8], f32[4,8])) -> pred[] {
  %c = (s32[], f32[5,4,8]{2,1,0}, f32[4,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%n, %five), direction=LT
}

ENTRY %main (x: f32[5,4,8], y: bf16[16]) -> bf16[128] {
  %x = f32[5,4,8]{2,1,0} parameter(0)
  %y = bf16[16]{0:T(128)} parameter(1)
  %start = s32[] constant(0)
  %init = f32[4,8]{1,0} broadcast(%start), dimensions={}
  %tuple = (s32[], f32[5,4,8]{2,1,0}, f32[4,8]{1,0}) tuple(%start, %x, %init)
  %loop = (s32[], f32[5,4,8]{2,1,0}, f32[4,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %on_chip = bf16[16]{0:T(128)S(1)} copy(%y)
  ROOT %all-gather.1 = bf16[128]{0} all-gather(%on_chip), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
}
"""


def test_loops_count_as_often_as_they_run() -> None:
    traffic = read_traffic(PROGRAM, 8)
    assert traffic.collectives == (
        Collective("all-gather", group=8, runs=1, bytes=256),
        Collective("all-reduce", group=2, runs=5, bytes=5 * 128),
    )
    assert [collective.sent for collective in traffic.collectives] == [256 * 7 / 8, 5 * 128 * 2 * 1 / 2]
    # Each round: the counter (two reads, one write), a slice and the counter read and a layer written, the all-reduce.
    each = (4 + 4 + 4) + (128 + 4 + 128) + (128 + 128)
    # Around them: a broadcast, a copy into the chip's own memory, and a gather out of it.
    assert traffic.memory_bytes == 5 * each + (4 + 128) + 32 + 256


# What runs beside the kernels: a matrix brought to the chip's memory (space 1), a result brought back from there, two
# of three rows of another matrix brought in apart and named as one, and a gather in two halves.
ASYNCHRONOUS = """HloModule jit_step

ENTRY %main (x: f32[16,8], y: f32[3,8], z: bf16[16]) -> f32[16,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %y = f32[3,8]{1,0} parameter(1)
  %z = bf16[16]{0} parameter(2)
  %in = (f32[16,8]{1,0:S(1)}, f32[16,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %here = f32[16,8]{1,0:S(1)} copy-done(%in)
  %first = ((f32[3,8]{1,0}), f32[1,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%y), slice={[0:1], [0:8]}
  %second = ((f32[3,8]{1,0}), f32[1,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%y), slice={[1:2], [0:8]}
  %one = f32[1,8]{1,0:S(1)} slice-done(%first)
  %two = f32[1,8]{1,0:S(1)} slice-done(%second)
  %rows = f32[2,8]{1,0:S(1)} custom-call(%one, %two), custom_call_target="ConcatBitcast"
  %gather = (bf16[16]{0}, bf16[128]{0}) all-gather-start(%z), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %gathered = bf16[128]{0} all-gather-done(%gather)
  %out = (f32[16,8]{1,0}, f32[16,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%here)
  ROOT %back = f32[16,8]{1,0} copy-done(%out)
}
"""


def test_asynchronous_moves_count_once() -> None:
    traffic = read_traffic(ASYNCHRONOUS, 8)
    assert traffic.collectives == (Collective("all-gather", group=8, runs=1, bytes=256),)
    assert traffic.memory_bytes == 512 + 512 + 2 * 32 + (32 + 256)


GROUPS = "replica_groups=[4,2]<=[8]"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (GROUPS, "replica_groups={{0,1,2,3},{4,5,6,7}}", [(5, 4)]),
        (GROUPS, "replica_groups=mesh['x'=1,'y'=4,'z'=2], device_ids=([2,4]T(1,0)) {'y'}", [(5, 4)]),
        (GROUPS, "replica_groups={}", [(5, 8)]),
        (GROUPS, "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", []),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}', [(3, 2)]),
        ("%five = s32[] constant(5)", "%five = s32[] get-tuple-element(%c), index=0", [(1, 2)]),
    ],
)
def test_notations_of_groups_and_trip_counts(old: str, new: str, expected: list[tuple[int, int]]) -> None:
    collectives = read_traffic(PROGRAM.replace(old, new), 8).collectives
    assert [(x.runs, x.group) for x in collectives if x.kind == "all-reduce"] == expected


WIDE = Architecture(
    image_size=64, in_channels=3, num_classes=10, stem="conv4", dim=64, depth=2, num_heads=4, mlp_ratio=4.0
)
SLIM = dataclasses.replace(WIDE, stage_blocks=(1, 1), keep_ratio=0.5)


def config(**changes: Any) -> Config:
    teacher = TeacherConfig(model=ModelConfig(architecture=WIDE))
    return tiny.config(arch=SLIM, **{"teacher": teacher, "model": ModelConfig(architecture=SLIM), **changes})


def test_costs_against_the_compilers_own_count() -> None:
    whole = config(batch_size=32)
    compiled = planning.compile_step(whole, sharding.make_mesh(devices=jax.devices()[:1]))
    text, counted = compiled.as_text(), compiled.cost_analysis()
    assert text is not None
    assert counted is not None
    traffic = read_traffic(text, 1)
    assert traffic.collectives == ()
    assert traffic.memory_bytes == pytest.approx(counted["bytes accessed"], rel=0.01)
    # The compiler also counts norms, softmax, GELU and the optimizer.
    products = 2 * count_step_macs(whole) * 32
    assert products < counted["flops"] < 1.2 * products


def test_bound_is_the_largest_of_three() -> None:
    chip = CHIPS["v5e"]
    traffic = Traffic((Collective("all-reduce", 16, 3, 80 * 10**9),), int(3 * chip.memory_rate))
    bound = planning.lower_bound(chip, 16, 16, 2 * chip.flops, traffic, steps=86400)
    assert bound == Bound(2.0, 3.0, 2 * 15 / 16 * 80 / 200, "memory", 3.0, 16 / 3, 3.0, 3.0 * 24 * 16)


def test_topologies() -> None:
    assert (parse_topology("v5e:16x16").devices, parse_topology("v4:2x2x4").devices) == (256, 16)
    for name in ("v5e", "v5e:4x", "v9:2x2", "v5e:2x2x2", "v4:4x4", "cpu:2x2", "cpu:0"):
        with pytest.raises(ConfigError, match=name.partition(":")[0]) as caught:
            parse_topology(name)
        assert caught.value.key == "--topology"


@pytest.mark.parametrize(
    ("topology", "facts"),
    [
        ("cpu:5", ("batch_size", "64", "5")),
        ("cpu:16", ("--topology", "8")),
        ("v5e:4x4", ("--topology", 'pip install "libtpu==')),
    ],
)
def test_refusals(topology: str, facts: tuple[str, ...], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert cli.main(["plan", "--config", "configs/digits.py", "--topology", topology]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(fact in line for fact in facts), line


SMALL: dict[str, Any] = {
    f"{model}.{key}": value
    for model in ("model", "teacher.model")
    for key, value in {"dim": 64, "num_heads": 4, "depth": 2}.items()
}


def sit_plan(*words: str, **values: Any) -> "subprocess.CompletedProcess[str]":
    overrides = [f"--config.{key}={value}" for key, value in {**SMALL, "model.stage_blocks": "(1,1)", **values}.items()]
    command = [sys.executable, "-m", "sit_jax", "plan", "--config", "configs/digits.py", *words, *overrides]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_command_on_virtual_devices() -> None:
    done = sit_plan("--topology", "cpu:4", "--json", **{"mesh.fsdp": 2})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["fits"]
    assert (result["devices"], result["mesh"]) == (4, {"data": 2, "fsdp": 2, "tensor": 1})
    assert (result["steps"], result["bound"]) == (4 * (1438 // 64), None)
    assert {collective["kind"] for collective in result["collectives"]} >= {"all-gather", "all-reduce"}
    memory = result["memory"]
    parts = ("arguments", "temporaries", "outputs", "program")
    assert all(memory[part] > 0 for part in parts[:2])
    assert memory["peak"] == sum(memory[part] for part in parts)


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_command_for_a_tpu_slice() -> None:
    done = sit_plan("--topology", "v4:2x2x2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("v4:2x2x2: 8 devices (data 8, fsdp 1, tensor 1), batch 64\n")
    for words in ("of 32", "all-reduce over 8, MB", "bound by ", "chip-hours, lower bound"):
        assert words in done.stdout
    assert all(line.startswith("sit plan: ") for line in done.stderr.splitlines()), done.stderr
    across = sit_plan("--topology", "v5e:4x4", **{"mesh.tensor": 4})
    assert across.returncode == 2
    assert "mesh.tensor: groups of 4 devices would lie across hosts" in across.stderr
    wrong = sit_plan("--topology", "v5e:3x3")
    assert wrong.returncode == 2
    assert "there is no slice v5e:3x3" in wrong.stderr


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_what_does_not_fit_says_what_would(capsys: Any) -> None:
    # Tokens of 512 channels on 1024 patches: some GiB per few pictures.
    arch = Architecture(image_size=512, num_classes=10, dim=512, depth=1, num_heads=8, mlp_ratio=4.0)
    large = Config(
        model=ModelConfig(architecture=arch), batch_size=4 * 500, eval_batch_size=4, loss=LossConfig(), init="random",
        optim=OptimConfig(),
    )  # fmt: skip
    topology = parse_topology("v5e:2x2")
    result = plan(large, topology)
    assert not result.fits
    assert result.needed_bytes is not None
    assert result.needed_bytes > 2 * CHIPS["v5e"].memory_bytes
    assert result.largest_batch is not None
    assert 0 < result.largest_batch < 1600
    assert plan(dataclasses.replace(large, batch_size=result.largest_batch), topology).fits
    print_plan(result)
    assert f"does not fit: the step needs {result.needed_bytes / 2**30:.2f} GiB" in capsys.readouterr().out
