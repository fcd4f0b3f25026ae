"""Images per second of a forward pass beside PyTorch's, with the same weights.

    python benchmarks/inference.py
    python benchmarks/inference.py --models sit_xsmall --batch_sizes 1 --dtypes float32 --contenders jax eager

Each framework lives in a process of its own (see turns.py) on the same cores with as many threads. JAX's is what
`sit benchmark` and the commands run; PyTorch's is the module of `sit_jax/io/export/torch_model.py` in evaluation mode,
eager and through `torch.compile`, in bfloat16 under autocast. The weights go from one to the other by a model folder,
and the logits of the first batch must agree. Each call takes another of four input buffers that lie on the device. On
a CPU every call is waited for, on an accelerator the last one of a turn. Contenders take turns, A B A B; the medians
of the rounds count, and of the ratios of neighbouring turns.
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

MODELS = ("sit_xsmall", "sit_small", "lvvit_small")
DTYPES = ("float32", "bfloat16")
CONTENDERS = ("jax", "eager", "compile")
BUFFERS = 4
# Largest difference of the logits, relative to the largest logit: bfloat16 has eight bits.
AGREE = {"float32": 1e-3, "bfloat16": 0.1}


class Jax:
    """The forward passes in JAX."""

    def __init__(self) -> None:
        turns.take_cores()
        self.cases: dict[str, Any] = {}

    def write(self, folder: str, name: str, tiny: bool) -> turns.Answer:
        shapes.write_folder(pathlib.Path(folder), name, tiny, rtsm=False)
        return {}

    def prepare(self, case: str, folder: str, batch: int, dtype: str, **_: Any) -> turns.Answer:
        import time

        import jax
        import numpy as np

        from sit_jax.io.inference import inference_model
        from sit_jax.io.load import load

        weights = load(pathlib.Path(folder))
        arch, variables = weights.arch, {"params": weights.params, "batch_stats": weights.batch_stats}
        model = inference_model(arch, variables, dtype)
        forward, prepared = model.jitted(batch), jax.device_put(model.weights)
        shape = (batch, *arch.image_shape, arch.in_channels)
        buffers = [jax.device_put(shapes.images(shape, index)) for index in range(BUFFERS)]
        begun = time.perf_counter()
        run = forward.lower(prepared, buffers[0]).compile()
        seconds = time.perf_counter() - begun
        logits = np.asarray(run(prepared, buffers[0]), np.float32)
        self.cases[case] = lambda index: run(prepared, buffers[index % BUFFERS])
        device = jax.devices()[0]
        return {
            "logits": logits.tolist(),
            "compile_s": seconds,
            "version": f"JAX {jax.__version__} on {device.device_kind}",
        }

    def time(self, case: str, calls: int) -> turns.Answer:
        import jax

        return turns.time_calls(self.cases[case], jax.block_until_ready, calls, jax.default_backend() == "cpu")

    def drop(self) -> turns.Answer:
        self.cases.clear()
        return {}


class Torch:
    """The forward passes in PyTorch."""

    def __init__(self) -> None:
        cores = turns.take_cores()
        import torch

        torch.set_num_threads(cores)
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as JAX has it by default.
        self.cases: dict[str, Any] = {}

    def prepare(self, case: str, folder: str, batch: int, dtype: str, mode: str) -> turns.Answer:
        import time

        import torch

        from sit_jax.io.export.torch_model import load

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = load(folder).to(device)
        arch = model.config["architecture"]
        shape = (batch, arch["image_size"], arch["image_size"], arch["in_channels"])
        pictures = [torch.tensor(shapes.images(shape, index)).permute(0, 3, 1, 2) for index in range(BUFFERS)]
        buffers = [picture.contiguous().to(device) for picture in pictures]
        forward = torch.compile(model) if mode == "compile" else model

        def call(index: int) -> Any:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                return forward(buffers[index % BUFFERS])

        begun = time.perf_counter()
        logits = call(0)
        seconds = time.perf_counter() - begun
        self.cases[case] = call
        where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        version = f"PyTorch {torch.__version__.partition('+')[0]} on {where}"
        return {"logits": logits.float().cpu().tolist(), "compile_s": seconds, "version": version}

    def time(self, case: str, calls: int) -> turns.Answer:
        import torch

        cuda = torch.cuda.is_available()
        wait = (lambda _: torch.cuda.synchronize()) if cuda else (lambda _: None)
        return turns.time_calls(self.cases[case], wait, calls, not cuda)

    def drop(self) -> turns.Answer:
        import torch

        self.cases.clear()
        torch.compiler.reset()
        return {}


def difference(mine: list[list[float]], theirs: list[list[float]]) -> float:
    """Largest difference of two batches of logits, relative to the largest of them."""
    import numpy as np

    return float(np.abs(np.subtract(mine, theirs)).max() / np.abs(theirs).max())


def compare(
    both: dict[str, turns.Child], folder: pathlib.Path, case: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Times all contenders in one case; a row of the table."""
    contenders: dict[str, tuple[turns.Child, str]] = {}
    row: dict[str, Any] = dict(case)
    reference: list[list[float]] | None = None
    for name in arguments.contenders:
        child = both["jax" if name == "jax" else "torch"]
        ready = child.ask("prepare", case=name, folder=str(folder), batch=case["batch"], dtype=case["dtype"], mode=name)
        reference = reference or ready["logits"]
        apart = difference(ready["logits"], reference)
        if not apart < AGREE[case["dtype"]]:
            raise RuntimeError(f"{name} says something else than {arguments.contenders[0]} in {case}: {apart:.2g}")
        row[f"{name}_compile_s"] = ready["compile_s"]
        arguments.versions.setdefault(child.name, ready["version"])
        contenders[name] = child, name
    found = turns.time_interleaved(contenders, arguments.rounds, arguments.seconds)
    for name, seconds in found.items():
        row[name] = case["batch"] / statistics.median(seconds)
    for name in ("eager", "compile"):
        if "jax" in found and name in found:
            row[f"over_{name}"] = turns.ratio(found[name], found["jax"])
    for child in both.values():
        child.ask("drop")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="named models")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.5, help="a turn lasts about so long")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each framework")
    parser.add_argument("--tiny", action="store_true", help="four narrow blocks on small pictures, to try the script")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--child", choices=("jax", "torch"), help=argparse.SUPPRESS)
    turns.add_keep_memory(parser)
    arguments = parser.parse_args()
    if arguments.child:
        turns.serve(arguments.child, Jax if arguments.child == "jax" else Torch)
        return
    arguments.versions, rows = {}, []
    with (
        tempfile.TemporaryDirectory() as scratch,
        turns.children(__file__, ["jax", "torch"], arguments.threads, arguments.keep_memory) as both,
    ):
        for name in arguments.models:
            folder = pathlib.Path(scratch) / name
            both["jax"].ask("write", folder=str(folder), name=name, tiny=arguments.tiny)
            for batch in arguments.batch_sizes:
                for dtype in arguments.dtypes:
                    case = {"model": name, "batch": batch, "dtype": dtype}
                    print(case, file=sys.stderr, flush=True)
                    rows.append(compare(both, folder, case, arguments))
        idle = {child.name: child.idle_cpu_s for child in both.values()}
    columns = {"model": "model", "batch": "batch", "dtype": "type"}
    columns |= {"jax": "JAX, images/s", "eager": "PyTorch eager", "compile": "torch.compile"}
    columns |= {"over_eager": "JAX over eager", "over_compile": "JAX over compile"}
    metadata = f"{'; '.join(arguments.versions.values())}; {turns.machine(arguments.threads)}"
    print(f"{metadata}; {arguments.rounds} rounds of {arguments.seconds:g} s\n\n{turns.table(rows, columns)}")
    print("\nProcessor seconds used while waiting: " + ", ".join(f"{name} {used:.2f}" for name, used in idle.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": metadata, "idle_cpu_s": idle, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
