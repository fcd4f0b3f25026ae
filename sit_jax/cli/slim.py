"""`sit slim`."""

import argparse
import pathlib

from sit_jax.cli.verb import TRAINED_MODEL, Verbs, add_checkpoint, add_verb, integers, positive


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit slim`."""
    parser = add_verb(verbs, "slim", run, "insert token reducers into a model, without training")
    add = parser.add_argument
    add("source", metavar="MODEL", type=pathlib.Path, help=TRAINED_MODEL)
    add("dest", metavar="DEST", type=pathlib.Path, help="model folder to write; must not exist")
    text = "slim, tome, topk, evit, or MODULE:CLASS of your own reducer"
    add("--reducer", metavar="NAME", required=True, help=text)
    count = parser.add_mutually_exclusive_group()
    text = "fraction of the tokens that each reducer keeps; 0.5 if no option of this kind is given"
    count.add_argument("--keep_ratio", metavar="NUMBER", type=float, help=text)
    text = "tokens that each reducer removes, at most half of them (ToMe's r)"
    count.add_argument("--r", metavar="N", type=positive, default=0, help=text)
    text = "patch tokens of each stage, the first of which is the whole grid"
    count.add_argument("--kept_tokens", metavar="N,N,...", type=integers, help=text)
    text = "blocks, counted from 1, with a reducer; each quarter of the depth if not given, with --r every block"
    add("--after", metavar="N,N,...", type=integers, help=text)
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the slimmed model."""
    from sit_jax.api import slim
    from sit_jax.io.load import load
    from sit_jax.models import reducer_params

    teacher = load(arguments.source, ema=arguments.ema, step=arguments.step)
    how = {name: getattr(arguments, name) for name in ("keep_ratio", "after", "reducer", "r")}
    student = slim(teacher, **how, kept_tokens=arguments.kept_tokens or ())
    student.save(arguments.dest)
    arch = student.vit
    print(f"Written: {arguments.dest}, {'/'.join(map(str, arch.token_counts))} tokens")
    if reducer_params(arch):
        print(f"The parameters of {arch.reducer} are random until the model is distilled: see sit train")
