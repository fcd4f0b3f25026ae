"""`sit compare`."""

import argparse
import dataclasses

from sit_jax.cli.config_file import add_config, load_config
from sit_jax.cli.runtime import enable_compilation_cache, keep_memory
from sit_jax.cli.verb import Verbs, above_0, add_verb, folder, integer, positive
from sit_jax.errors import ConfigError, PartialFailureError, listed

# Keys of the recipe that the sweep sets, and the options that select their values.
_SET_BY_SWEEP = {"model.reducer": "--reducers", "model.keep_ratio": "--keep_ratios", "seed": "--seeds"}


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit compare`."""
    parser = add_verb(verbs, "compare", run, "compare token reducers that are trained by one recipe")
    add_config(parser)
    add = parser.add_argument
    add("--workdir", type=folder, required=True, help="folder of the trainings, the table and the page")
    add("--reducers", metavar="NAME", nargs="+", help="token reducers; those of get_sweep() if not given")
    add("--keep_ratios", metavar="X", nargs="+", type=above_0(1), help="keep ratios; as in get_sweep() if not given")
    text = "frd, ce or untrained; as in get_sweep() if not given"
    add("--objectives", metavar="NAME", nargs="+", choices=("frd", "ce", "untrained"), help=text)
    add("--seeds", metavar="N", nargs="+", type=integer(0), help="seeds; as in get_sweep() if not given")
    text = "batch sizes at which the models are timed; as in get_sweep() if not given"
    add("--batch_sizes", metavar="N", nargs="+", type=positive, help=text)
    add("--parallel", metavar="N", type=positive, default=1, help="number of trainings at once, each on its own GPU")
    text = "measuring time of each model and batch size, in seconds"
    add("--seconds", type=above_0(1e6), default=3.0, help=text)


def run(arguments: argparse.Namespace) -> None:
    """Trains, measures, prints the table and writes the page."""
    from sit_jax.config.files import get_sweep

    names = ("reducers", "keep_ratios", "objectives", "seeds", "batch_sizes")
    changes = {name: tuple(values) for name in names if (values := getattr(arguments, name)) is not None}
    sweep = dataclasses.replace(get_sweep(arguments.config), **changes)
    for override in arguments.overrides:
        key = override.partition("=")[0].removeprefix("--config.")
        if key in _SET_BY_SWEEP:
            raise ConfigError(key, f"is set by the comparison; use {_SET_BY_SWEEP[key]}")
    enable_compilation_cache()
    keep_memory()
    from sit_jax.analysis.compare import Recipe, compare, print_comparison
    from sit_jax.io.runs import COMPARE, COMPARE_PAGE
    from sit_jax.report.compare_page import write_page

    recipe = Recipe(
        arguments.config,
        arguments.overrides,
        load=lambda more: load_config(arguments.config, [*arguments.overrides, *more]),
    )
    result = compare(recipe, sweep, arguments.workdir, arguments.parallel, arguments.seconds)
    print_comparison(result)
    write_page(result, arguments.workdir / COMPARE_PAGE, "--workdir")
    print(f"Written: {COMPARE} and {COMPARE_PAGE}, in {arguments.workdir}")
    if result["failed"]:
        failed = [f"{entry['name']} ({entry['log']})" for entry in result["failed"]]
        raise PartialFailureError(f"{len(failed)} trainings failed: {listed(failed)}")
