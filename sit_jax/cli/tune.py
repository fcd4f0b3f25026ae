"""`sit tune`."""

import argparse
import dataclasses
import json
import pathlib
import shlex
from typing import TYPE_CHECKING, Any

from sit_jax.cli.runtime import enable_compilation_cache, force_cpu, keep_memory
from sit_jax.cli.verb import TRAINED_MODEL, Verbs, above_0, add_checkpoint, add_verb, integer, positive
from sit_jax.errors import ConfigError, UserError

if TYPE_CHECKING:
    from sit_jax.analysis.chips import Topology
    from sit_jax.data.config import DataConfig
    from sit_jax.io.model import Model


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit tune`."""
    parser = add_verb(verbs, "tune", run, "choose the number of tokens for a latency, a throughput or a cost")
    add = parser.add_argument
    add("source", metavar="MODEL", type=pathlib.Path, help=TRAINED_MODEL)
    budget = parser.add_mutually_exclusive_group()
    number = above_0(1e9)
    budget.add_argument("--latency_ms", metavar="X", type=number, help="largest latency of a batch, in milliseconds")
    budget.add_argument("--images_per_s", metavar="X", type=number, help="least throughput, in images/s")
    budget.add_argument("--gmac", metavar="X", type=number, help="largest cost of an image, in GMAC")
    add("--batch", metavar="N", type=positive, help="batch size; 1 if not given")
    add("--target", choices=("jax", "onnxruntime"), help="runtime on this machine; jax if not given")
    text = "TPU of one chip, such as v5e:1x1, by the compiler's lower bound, instead of this machine"
    add("--topology", help=text)
    text = "dtype of the matrix products, jax only; float32 if not given"
    add("--dtype", choices=("float32", "bfloat16"), help=text)
    text = "number of schedules to try between two that the model was trained for; 3 if not given"
    add("--between", metavar="N", type=integer(0, 32), help=text)
    add("--seconds", type=above_0(1e6), help="measuring time of each schedule, in seconds; 3 if not given")
    add_checkpoint(parser)
    add("--name", help="data set to evaluate on; that of the training if not given")
    add("--split", dest="eval_split", metavar="SPLIT", help="split; data.eval_split of the run if not given")
    add("--data_dir", metavar="FOLDER", help="folder of the data set; data.data_dir of the run if not given")
    text = "propose reducers for a model without any: after which blocks, and how many tokens (--gmac)"
    add("--before_training", action="store_true", help=text)
    text = "config file to write, which trains the proposal (--before_training)"
    add("--output", metavar="FILE.py", type=pathlib.Path, help=text)
    text = "number of reducers of the proposal (--before_training); 3 if not given"
    add("--reducers", metavar="N", type=integer(1, 4), help=text)
    text = "number of training images to measure (--before_training); 256 if not given"
    add("--limit", metavar="N", type=positive, help=text)
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table and the choice."""
    keep_memory()
    enable_compilation_cache()
    from sit_jax.io.load import load

    options = _options(arguments)
    topology = _topology(options)
    output = options.get("output")
    if output is not None and (output.suffix != ".py" or output.exists()):
        raise UserError(f"--output: {output} must be a new .py file")
    model = load(arguments.source, ema=arguments.ema, step=arguments.step)
    keys = ("name", "eval_split", "data_dir")
    data = model.evaluation_data({key: value for key in keys if (value := getattr(arguments, key)) is not None})
    if arguments.before_training:
        _propose(arguments, options, model, data)
        return
    from sit_jax.analysis.tune import KINDS, Budget, Runtime, print_tuning, tune

    budget = next(Budget(kind, value) for kind in KINDS if (value := getattr(arguments, kind)) is not None)
    runtime = Runtime(options["target"], topology, options["batch"], options["dtype"], options["seconds"])
    by_labels = model.is_labelled(named=arguments.name is not None)
    result = tune(model, budget, runtime, data, options["between"], by_labels)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        step = [] if arguments.step is None else ["--step", str(arguments.step)]
        print_tuning(result, budget, [str(arguments.source), *["--ema"] * arguments.ema, *step])


# Options of either kind of answer, and their values if they are not given.
_MEASURING = {"batch": 1, "target": "jax", "topology": None, "dtype": "float32", "between": 3, "seconds": 3.0}
_PROPOSING = {"output": None, "reducers": 3, "limit": 256}


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the options; raises a UserError for one that would do nothing."""
    proposes = arguments.before_training
    # Not by argparse: it would say so of a misspelt option, instead of naming it.
    if arguments.latency_ms is arguments.images_per_s is arguments.gmac is None:
        raise UserError("--latency_ms, --images_per_s or --gmac: one of them is needed")
    mine, others = (_PROPOSING, _MEASURING) if proposes else (_MEASURING, _PROPOSING)
    for name in others:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name}: {'is not for' if proposes else 'needs'} --before_training")
    if proposes and arguments.ema:
        raise UserError("--ema: is not for --before_training; a run trains from its teacher's own weights")
    found = {
        name: default if getattr(arguments, name) is None else getattr(arguments, name)
        for name, default in mine.items()
    }
    if arguments.target == "onnxruntime" and arguments.dtype == "bfloat16":
        raise UserError("--dtype: onnxruntime runs in float32")
    return found


def _topology(options: dict[str, Any]) -> "Topology | None":
    """Returns the TPU to choose for, and restricts JAX to the CPU for it; None for this machine."""
    from sit_jax.analysis.chips import parse_topology

    if options.get("topology") is None:
        return None
    topology = parse_topology(options["topology"])
    if topology.chip is None or topology.devices > 1:
        raise ConfigError("--topology", f"{topology.name} must be a TPU of one chip, such as v5e:1x1")
    if options["target"] != "jax":
        raise ConfigError("--topology", "is for jax; leave --target out")
    force_cpu()
    return topology


def _propose(arguments: argparse.Namespace, options: dict[str, Any], model: "Model", data: "DataConfig") -> None:
    """Measures the redundancy of a model's tokens, and prints and writes a proposal."""
    from sit_jax.analysis.redundancy import print_proposal, propose, redundancy, write_config
    from sit_jax.analysis.tune import log
    from sit_jax.io.checkpoint import FOLDER
    from sit_jax.io.runs import find_checkpoint

    if arguments.gmac is None:
        raise UserError("--before_training: needs --gmac; the cost of a model that is not trained is counted")
    if model.vit.is_slimmed:
        raise UserError(f"{arguments.source}: is slimmed already; give its teacher")
    log(f"measuring the redundancy of {options['limit']} images' tokens")
    curves = redundancy(model, data, options["limit"])
    proposal = propose(model.vit, curves, options["reducers"], arguments.gmac)
    output = options["output"]
    if output is not None:
        if arguments.step is not None:
            folder, _ = find_checkpoint(arguments.source)
            model = dataclasses.replace(model, source=str(folder / FOLDER / str(arguments.step)))
        write_config(output, proposal, model, data)
    if arguments.json:
        arch = proposal.arch
        values = {"stage_blocks": arch.stage_blocks, "kept_tokens": arch.kept_tokens, "error": proposal.error}
        print(json.dumps({**values, "curves": curves.round(6).tolist()}))
        return
    print_proposal(proposal, curves, model.vit)
    if output is not None:
        print(f"Written: {output}; train it with {shlex.join(['sit', 'train', '--config', str(output)])}")
