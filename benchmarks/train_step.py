"""The step of feature recalibration distillation beside PyTorch's: time and peak memory, from the same weights.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --dtypes float32 --contenders jax eager

A step is the teacher's forward pass, the student with its reverse modules forward and backward, and AdamW, in JAX as
the trainer runs it, in PyTorch as `sit_jax/io/export/torch_model.py` says, in bfloat16 under autocast, with the fused
AdamW. Every contender has a process of its own (see turns.py) on the same cores with as many threads. Weights go from
one to the other by model folders, and the losses of the first steps must agree. Each step takes another of four
batches that lie on the device. On a CPU every step is waited for, on an accelerator the last one of a turn.
Contenders take turns, A B A B; the medians of the rounds count, and of the ratios of neighbouring turns.

Peak memory on a CPU is the largest resident memory of two steps long after the compilation, above what was resident
when the libraries were loaded; on an accelerator what its allocator says.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import shapes
import turns

DTYPES = ("float32", "bfloat16")
CONTENDERS = ("jax", "eager", "compile")
BUFFERS = 4
RATE = 1e-4
# Largest relative difference of a loss in the first three steps.
AGREE = {"float32": 2e-3, "bfloat16": 0.1}
FIRST_STEPS = 3


def teacher_of(name: str) -> str:
    """The un-slimmed teacher of one of the paper's models."""
    return name.replace("sit_", "lvvit_")


class Jax:
    """The step in JAX."""

    def __init__(self) -> None:
        turns.take_cores()
        self.state: Any = None
        self.step: Any = None

    def write(self, folder: str, name: str, tiny: bool) -> turns.Answer:
        shapes.write_folder(pathlib.Path(folder) / "student", name, tiny, rtsm=True)
        shapes.write_folder(pathlib.Path(folder) / "teacher", teacher_of(name), tiny, rtsm=False, seed=1)
        return {}

    def prepare(self, folder: str, batch: int, dtype: Any, **_: Any) -> turns.Answer:
        import time

        import jax
        import jax.numpy as jnp

        from sit_jax.config import Config, LossConfig, ModelConfig, OptimConfig, TeacherConfig
        from sit_jax.io.load import load
        from sit_jax.parallel import sharding
        from sit_jax.training.state import TrainState
        from sit_jax.training.step import freeze_teachers, make_train_spec, make_train_step

        before = turns.resident_mib()
        student, teacher = (load(pathlib.Path(folder) / name) for name in ("student", "teacher"))
        models = [ModelConfig(architecture=x.arch, dtype=dtype) for x in (student, teacher)]
        config = Config(
            model=models[0],
            teacher=TeacherConfig(model=models[1]),
            batch_size=batch,
            loss=LossConfig(token=2.0, logits=2.0),
            optim=OptimConfig(lr=RATE, min_lr=RATE, rtsm_lr_scale=1.0),
        )
        task, mesh = make_train_spec(config, steps_per_epoch=1000), sharding.make_mesh(devices=jax.devices()[:1])
        params = jax.tree.map(jnp.array, {"model": student.params, "rtsm": student.rtsm})
        stats = jax.tree.map(jnp.array, student.batch_stats)
        fresh = TrainState(jnp.zeros((), jnp.int32), params, stats, task.optimizer.init(params), None)
        self.state = jax.device_put(fresh, sharding.state_shardings(mesh, fresh))
        variables = {"params": teacher.params, "batch_stats": teacher.batch_stats}
        variables = jax.device_put(variables, sharding.state_shardings(mesh, variables))
        self.teachers = freeze_teachers(task, {"teacher": variables})
        arch = student.arch
        shape = (batch, *arch.image_shape, arch.in_channels)
        del params, stats, fresh, student, teacher, variables
        self.batches = [
            sharding.put_batch(
                mesh, {"image": shapes.images(shape, i), "label": shapes.labels(batch, arch.num_classes, i)}
            )
            for i in range(BUFFERS)
        ]
        begun = time.perf_counter()
        compiled = make_train_step(task, mesh).lower(self.state, self.batches[0], self.teachers).compile()  # type: ignore[attr-defined]
        self.step, seconds = compiled, time.perf_counter() - begun
        losses = [float(self.call(index)["loss"]) for index in range(FIRST_STEPS)]
        version = f"JAX {jax.__version__} on {jax.devices()[0].device_kind}"
        return {"losses": losses, "compile_s": seconds, "version": version, "before_mib": before}

    def call(self, index: int) -> Any:
        self.state, metrics = self.step(self.state, self.batches[index % BUFFERS], self.teachers)
        return metrics

    def time(self, case: str, calls: int) -> turns.Answer:
        import jax

        wait = lambda metrics: jax.block_until_ready((metrics, self.state))  # noqa: E731
        return turns.time_calls(self.call, wait, calls, jax.default_backend() == "cpu")

    def peak(self) -> turns.Answer:
        import jax

        if jax.default_backend() == "cpu":
            return {"peak_mib": host_peak(lambda: self.time("", 2))}
        return {"peak_mib": jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20}


class Torch:
    """The step in PyTorch."""

    def __init__(self) -> None:
        cores = turns.take_cores()
        import torch

        torch.set_num_threads(cores)
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as JAX has it by default.

    def prepare(self, folder: str, batch: int, dtype: str, mode: str, **_: Any) -> turns.Answer:
        import time

        import torch

        from sit_jax.io.export.torch_model import distillation_loss, load, parameter_groups

        before = turns.resident_mib()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        student, teacher = (load(pathlib.Path(folder) / name).to(device) for name in ("student", "teacher"))
        student.train()
        optimizer = torch.optim.AdamW(parameter_groups(student, RATE, rtsm_lr_scale=1.0), eps=1e-8, fused=True)
        arch = student.config["architecture"]
        shape = (batch, arch["image_size"], arch["image_size"], arch["in_channels"])
        pictures = [torch.tensor(shapes.images(shape, i)).permute(0, 3, 1, 2).contiguous() for i in range(BUFFERS)]
        labels = [torch.tensor(shapes.labels(batch, arch["num_classes"], i)) for i in range(BUFFERS)]
        batches = [(x.to(device), y.to(device)) for x, y in zip(pictures, labels, strict=True)]
        compute: Any = torch.compile(distillation_loss) if mode == "compile" else distillation_loss

        def call(index: int) -> Any:
            images, targets = batches[index % BUFFERS]
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = compute(student, teacher, images, targets)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        self.call = call
        begun = time.perf_counter()
        first = call(0).item()
        seconds = time.perf_counter() - begun
        losses = [first, *(call(index).item() for index in range(1, FIRST_STEPS))]
        where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        version = f"PyTorch {torch.__version__.partition('+')[0]} on {where}"
        return {"losses": losses, "compile_s": seconds, "version": version, "before_mib": before}

    def time(self, case: str, calls: int) -> turns.Answer:
        import torch

        cuda = torch.cuda.is_available()
        wait = (lambda _: torch.cuda.synchronize()) if cuda else (lambda _: None)
        return turns.time_calls(self.call, wait, calls, not cuda)

    def peak(self) -> turns.Answer:
        import torch

        if not torch.cuda.is_available():
            return {"peak_mib": host_peak(lambda: self.time("", 2))}
        torch.cuda.reset_peak_memory_stats()
        self.time("", 2)
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20}


def host_peak(run: Any) -> float:
    """The largest resident memory while something runs."""
    turns.forget_peak()
    run()
    return turns.peak_mib()


def compare(folder: pathlib.Path, dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times all contenders in one type; a row of the table for each."""
    rows: list[dict[str, Any]] = []
    names = arguments.contenders
    with turns.children(__file__, names, arguments.threads, arguments.keep_memory) as contenders:
        for name in names:
            print(f"{dtype}: {name}", file=sys.stderr, flush=True)
            words = {"batch": arguments.batch_size, "dtype": dtype, "mode": name}
            row = contenders[name].ask("prepare", folder=str(folder), **words)
            reference = rows[0]["losses"] if rows else row["losses"]
            apart = max(abs(a / b - 1) for a, b in zip(row["losses"], reference, strict=True))
            if not apart < AGREE[dtype]:
                raise RuntimeError(f"{name} has other losses than {names[0]}: {row['losses']}, {reference}")
            rows.append({"name": name, "dtype": dtype, **row})
        found = turns.time_interleaved(
            {name: (child, "") for name, child in contenders.items()}, arguments.rounds, arguments.seconds
        )
        for row in rows:
            name = row["name"]
            row["seconds"] = statistics.median(found[name])
            row["images_per_s"] = arguments.batch_size / row["seconds"]
            if "jax" in found:
                row["jax_over"] = turns.ratio(found[name], found["jax"])
            peak = contenders[name].ask("peak")["peak_mib"]
            on_host = row["version"].endswith("cpu")
            row["peak_mib"] = round(peak - row["before_mib"] if on_host else peak)
            row["idle_cpu_s"] = contenders[name].idle_cpu_s
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sit_xsmall", help="one of the paper's students")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=1.0, help="a turn lasts about so long, and a step at least")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each framework")
    parser.add_argument("--tiny", action="store_true", help="four narrow blocks on small pictures, to try the script")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    turns.add_keep_memory(parser)
    arguments = parser.parse_args()
    if arguments.child:
        turns.serve(arguments.child, Jax if arguments.child == "jax" else Torch)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        with turns.children(__file__, ["jax"], arguments.threads, arguments.keep_memory) as only:
            only["jax"].ask("write", folder=scratch, name=arguments.model, tiny=arguments.tiny)
        for dtype in arguments.dtypes:
            rows += compare(pathlib.Path(scratch), dtype, arguments)
    told = {"jax": "JAX", "eager": "PyTorch eager", "compile": "torch.compile"}
    columns = {"contender": "", "dtype": "type", "seconds": "s per step", "images_per_s": "images/s"}
    columns |= {"jax_over": "JAX over it", "peak_mib": "peak MiB", "compile_s": "compile s"}
    columns |= {"idle_cpu_s": "CPU s while waiting"}
    for row in rows:
        row["contender"] = told[row["name"]]
    metadata = "; ".join(dict.fromkeys(row["version"] for row in rows))
    metadata = f"{arguments.model}, batch {arguments.batch_size}; {metadata}; {turns.machine(arguments.threads)}"
    print(f"{metadata}; {arguments.rounds} rounds of {arguments.seconds:g} s\n\n{turns.table(rows, columns)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": metadata, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
