"""`sit benchmark`."""

import argparse
import pathlib
from typing import Any

from sit_jax.cli.argument_types import positive
from sit_jax.cli.runtime import keep_memory, set_log_levels
from sit_jax.cli.verb import add_verb


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "benchmark", run, "time models side by side")
    text = "a named model (see sit models), a run's folder, a model folder, a .onnx or .stablehlo file"
    parser.add_argument("models", metavar="MODEL", nargs="+", help=text)
    parser.add_argument("--teacher", metavar="MODEL", help="reference model; the first if not given")
    sizes = [1, 16, 64]
    parser.add_argument("--batch_sizes", metavar="N", nargs="+", type=positive, default=sizes, help="batch sizes")
    types = ("float32", "bfloat16")
    parser.add_argument(
        "--dtype", default="float32", choices=types, help="dtype of the products; exported files keep theirs"
    )
    parser.add_argument(
        "--seconds", type=_duration, default=3.0, help="seconds of measurement for each model and batch size"
    )
    parser.add_argument("--rounds", type=positive, default=9, help="interleaved rounds that this time is divided into")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="plot accuracy, or GMAC, over throughput")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Times models in turns."""
    set_log_levels()
    keep_memory()
    from sit_jax.analysis.benchmark_table import Settings, command

    settings = Settings(arguments.batch_sizes, arguments.dtype, arguments.seconds, arguments.rounds)
    command(arguments.models, arguments.teacher, settings, arguments.json, arguments.plot)


def _duration(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be above 0, is {text}")
    return value
