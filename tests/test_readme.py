"""What the README says is true."""

import doctest
import pathlib
import re
import shlex

import pytest

from sit_jax import cli
from sit_jax.analysis.flops import count_cost
from sit_jax.models.variants import VARIANTS

README = pathlib.Path("README.md")
TEXT = README.read_text()


def test_python_examples() -> None:
    result = doctest.testfile(str(README.absolute()), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 8
    assert result.failed == 0


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("sit ")]


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    # Training itself is tested on smaller models; here every word of every command must be one that the parser and
    # the configuration take.
    seen = set()
    for words in commands():
        arguments, rest = cli._parser().parse_known_args(words[1:])
        seen.add(arguments.verb)
        if "config" in arguments:
            cli.load_config(arguments.config, rest)
        else:
            assert rest == []
    assert seen == {
        "train",
        "evaluate",
        "models",
        "data",
        "checkpoint",
        "export",
        "predict",
        "plan",
        "convert",
        "visualize",
        "report",
    }


def test_variations() -> None:
    overrides = re.findall(r"--config\.[a-z][\w.]*=[\w./-]+", TEXT)
    assert len(overrides) >= 8
    for override in overrides:
        cli.load_config("configs/digits.py", [override])


def test_make_targets() -> None:
    makefile = pathlib.Path("Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_table_of_models() -> None:
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| sit_")]
    assert len(rows) == 5
    for name, params, both, gmac, tokens, size, _, teacher, teacher_gmac, _ in rows:
        cost, arch = count_cost(VARIANTS[name]), VARIANTS[name]
        assert params == f"{cost.params:,}"
        assert both == f"{cost.params + cost.reverse_params:,}"
        assert gmac == f"{cost.gmac:.2f}"
        assert tokens == "/".join(str(count) for count in arch.token_counts)
        assert size == str(arch.image_size)
        assert VARIANTS[teacher] == arch.without_slimming()
        assert teacher_gmac == f"{count_cost(VARIANTS[teacher]).gmac:.2f}"
