"""The command line: `sit VERB ...`.

Verbs import what they need when they run, so that `sit --help` answers at once.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sit_jax import __version__
from sit_jax.errors import ConfigError, UserError

Verb = Callable[[argparse.Namespace, list[str]], None]

USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    strays = [word for word in rest if not (arguments.verb == "train" and word.startswith("--config."))]
    if strays:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    try:
        arguments.run(arguments, rest)
    except UserError as error:
        print(f"sit {arguments.verb}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"sit {arguments.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sit", description="Slims vision transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sit_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = _verb(verbs, "train", _train, "train a model, or a teacher and its slimmed student")
    train.add_argument("--config", required=True, help="Python file with a get_config() that returns a ConfigDict")
    train.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the run; made if missing")
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder, if there is one")
    train.epilog = "Any value of the configuration: --config.KEY=VALUE, such as --config.optim.lr=1e-3"
    evaluate = _verb(verbs, "evaluate", _evaluate, "evaluate a run's checkpoint over its evaluation split")
    evaluate.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of a run")
    evaluate.add_argument("--ema", action="store_true", help="the moving average of the weights")
    evaluate.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    models = _verb(verbs, "models", _models, "list the named models and what they cost")
    models.add_argument("--json", action="store_true", help="print a list of objects")
    return parser


def _verb(verbs: Any, name: str, run: Verb, help_text: str) -> argparse.ArgumentParser:
    description = help_text[0].upper() + help_text[1:] + "."
    parser = verbs.add_parser(name, help=help_text, description=description, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(arguments.config, overrides)
    _quiet_libraries()
    from sit_jax.analysis.report import print_summary, summarize
    from sit_jax.run import run

    run(config, arguments.workdir, arguments.resume, label="student" if config.teacher else "model")
    print_summary(summarize(arguments.workdir))
    print(f"Written: {arguments.workdir / 'summary.json'}, curves.png and the checkpoints beside it")


def _evaluate(arguments: argparse.Namespace, _: list[str]) -> None:
    _quiet_libraries()
    from sit_jax.run import evaluate_run

    result = evaluate_run(arguments.workdir, arguments.ema, arguments.step)
    if arguments.json:
        print(json.dumps(result))
        return
    shares = f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f}"
    print(f"{shares} over {result['examples']:.0f} examples")


def _models(arguments: argparse.Namespace, _: list[str]) -> None:
    from sit_jax.analysis.flops import count_cost
    from sit_jax.models.variants import VARIANTS

    rows: list[dict[str, Any]] = []
    for name, arch in VARIANTS.items():
        cost = count_cost(arch)
        rows.append(
            {
                "name": name,
                "params": cost.params,
                "rtsm_params": cost.reverse_params,
                "gmac": round(cost.gmac, 4),
                "tokens": list(arch.token_counts),
                "image_size": arch.image_size,
            }
        )
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    headings = ("model", "parameters", "with RTSM", "GMAC", "tokens", "px")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("model", "tokens") else "right", no_wrap=True)
    for row in rows:
        both = row["params"] + row["rtsm_params"]
        tokens = "/".join(str(count) for count in row["tokens"])
        table.add_row(
            row["name"], f"{row['params']:,}", f"{both:,}", f"{row['gmac']:.3f}", tokens, str(row["image_size"])
        )
    Console().print(table)


def load_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """Reads a config file and the `--config.KEY=VALUE` words, and checks the result.

    Raises:
        ConfigError: No such file, an error in it, an unknown key or an impossible value.
    """
    from absl import flags
    from ml_collections import config_flags

    from sit_jax.config import from_config_dict

    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--config: there is no file {path}")
    values = flags.FlagValues()
    words = ["sit", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    try:
        values(words)
        config = values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_override_problem(error)) from None
    except Exception as error:  # Whatever a user's own Python file does.
        raise ConfigError(f"--config: {path} raises {type(error).__name__}: {error}") from None
    return from_config_dict(config)


def _override_problem(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    # ml_collections nests one KeyError's text, quoted and escaped, in another's.
    text = text.replace("\\n", " ").replace("\\'", "").replace("'", "")
    return " ".join(text.split())[:400]


def _quiet_libraries() -> None:
    from absl import logging

    logging.set_verbosity(logging.WARNING)
