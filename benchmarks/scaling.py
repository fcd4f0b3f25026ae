"""Makes the tables of docs/scaling.md: runs `sit plan --json` where a plan is missing, and prints Markdown.

    python benchmarks/scaling.py models growth collectives

Plans that are in benchmarks/plans already are not made again: remove them to have them anew. The TPU compiler takes
minutes for each.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

MODELS = ("tiny", "xsmall", "small", "medium", "large")
SLICES = {"v5e:2x4": 8, "v5e:16x16": 256, "v4:2x2x4": 16}
# The recipe's batch where there are chips enough for it, else less.
BATCHES = {
    "v5e:2x4": {"tiny": 512, "xsmall": 512, "small": 512, "medium": 256, "large": 64},
    "v5e:16x16": dict.fromkeys(MODELS, 1024),
    "v4:2x2x4": {**dict.fromkeys(MODELS, 1024), "large": 256},
}
GROWTH = {"v5e:2x4": 8, "v5e:8x8": 64, "v5e:16x16": 256}
MESHES = ((8, 1, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2))
# Every kind of layer, wide enough to be split, unrolled: each collective is told by itself.
SMALL = [
    "model.dim=192",
    "teacher.model.dim=192",
    "model.num_heads=4",
    "teacher.model.num_heads=4",
    "model.depth=4",
    "teacher.model.depth=4",
    "model.stage_blocks=(1,1,1,1)",
    "model.remat=False",
    "teacher.model.remat=False",
    "batch_size=64",
]


ONLY_MADE = False


def plan(folder: pathlib.Path, name: str, config: str, topology: str, overrides: list[str]) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    if not path.exists() and ONLY_MADE:
        return None
    if not path.exists():
        print(f"planning {name}", file=sys.stderr, flush=True)
        words = ["plan", "--config", config, "--topology", topology, "--json"]
        command = [sys.executable, "-m", "sit_jax", *words, *(f"--config.{override}" for override in overrides)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def imagenet(folder: pathlib.Path, model: str, topology: str, batch: int) -> dict[str, Any] | None:
    name = f"{model}_{topology.replace(':', '_')}_{batch}"
    overrides = [f"batch_size={batch}", f"eval_batch_size={batch}"]
    return plan(folder, name, f"configs/imagenet_sit_{model}.py", topology, overrides)


def row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(cells: list[str]) -> None:
    print(row(cells))
    print(row(["---"] * len(cells)))


def times(result: dict[str, Any]) -> list[str]:
    bound = result["bound"]
    parts = [f"{1e3 * bound[name]:.1f}" for name in ("compute_s", "memory_s", "network_s")]
    return [*parts, f"{bound['images_per_s']:,.0f}", f"{bound['days']:.2g}", f"{bound['chip_hours']:,.0f}"]


COLUMNS = [
    "GiB per chip",
    "of it arguments",
    "products, ms",
    "memory, ms",
    "network, ms",
    "images/s at most",
    "days",
    "chip-hours",
]


def cells(result: dict[str, Any]) -> list[str]:
    if not result["fits"]:
        largest = f"does not fit; the largest batch that does is {result['largest_batch']}"
        return [largest, *[""] * (len(COLUMNS) - 1)]
    memory = result["memory"]
    return [f"{memory['peak'] / 2**30:.2f}", f"{memory['arguments'] / 2**30:.2f}", *times(result)]


def models(folder: pathlib.Path) -> None:
    head(["model", "slice", "chips", "batch", *COLUMNS])
    for topology, chips in SLICES.items():
        for model in MODELS:
            batch = BATCHES[topology][model]
            result = imagenet(folder, model, topology, batch)
            if result:
                print(row([f"sit_{model}", topology, chips, batch, *cells(result)]))


def growth(folder: pathlib.Path) -> None:
    head(["held", "slice", "chips", "batch", *COLUMNS, "μs per image and chip"])
    for held in ("64 per chip", "1024 in all"):
        for topology, chips in GROWTH.items():
            batch = 64 * chips if held == "64 per chip" else 1024
            result = imagenet(folder, "tiny", topology, batch)
            if result and result["fits"]:
                each = 1e6 * result["bound"]["step_s"] * chips / batch
                print(row([held, topology, chips, batch, *cells(result), f"{each:.0f}"]))


def collectives(folder: pathlib.Path) -> None:
    head(["mesh (data x fsdp x tensor)", "collective", "devices", "a step", "MB in all", "MB sent by each device"])
    for data, fsdp, tensor in MESHES:
        sizes = [f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"]
        name = f"{data} x {fsdp} x {tensor}"
        result = plan(folder, f"coll_{data}x{fsdp}x{tensor}", "configs/digits.py", "cpu:8", [*SMALL, *sizes])
        for entry in result["collectives"] if result else ():
            group, share = entry["group"], (entry["group"] - 1) / entry["group"]
            factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(entry["kind"], share)
            size = entry["bytes"] / 1e6
            print(row([name, entry["kind"], group, entry["runs"], f"{size:.2f}", f"{size * factor:.2f}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--plans", type=pathlib.Path, default=pathlib.Path(__file__).parent / "plans", help="folder of the plans"
    )
    parser.add_argument("tables", nargs="+", choices=("models", "growth", "collectives"), help="which tables to make")
    parser.add_argument("--only_made", action="store_true", help="leave out what is not in the folder yet")
    arguments = parser.parse_args()
    global ONLY_MADE
    ONLY_MADE = arguments.only_made
    for table in arguments.tables:
        {"models": models, "growth": growth, "collectives": collectives}[table](arguments.plans)
        print()


if __name__ == "__main__":
    main()
