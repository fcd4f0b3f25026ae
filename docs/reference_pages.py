"""Pages that are made from the code when the site is built: the configuration's keys and the commands' words.

A hook of MkDocs (mkdocs.yml). The pages have no source file that could grow old: a key without a description, or a word
without help, stops the build. Pages that live elsewhere in the repository are taken in as well, and pages that
mkdocs.yml does not place come last in the navigation.
"""

import argparse
import collections.abc
import dataclasses
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from sit_jax.cli import app as cli
from sit_jax.config import Config, ModelConfig
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture

CONFIGURATION = "reference/configuration.md"
COMMANDS = "reference/commands.md"
# Location in the repository of pages that are not in docs/.
TAKEN_IN = {"launch.md": "launch/README.md", "changelog.md": "CHANGELOG.md"}
OTHER_PAGES = "More"

_CONFIGURATION_INTRO = """# Configuration

A configuration is a Python file whose `get_config()` returns an `ml_collections.ConfigDict`; `configs/` has one file
per experiment. Every key below can be set there, or on the command line as `--config.KEY=VALUE`
(`--config.optim.lr=1e-3`). Other keys have their defaults. The error message of a wrong key or value names the key.

This page is generated from `sit_jax.config.schema` and `sit_jax.data.config`, which validate the values.
"""
_COMMANDS_INTRO = """# Commands

This page is generated from the parsers; `sit VERB --help` prints the same text.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | some inputs could not be read, all others were processed; or processes of the run are missing |
| 2 | nothing was done; the message names the input and what to do |
| 75 | stopped by a signal after saving; the same command with `--resume` continues |
| 130 | interrupted |
"""


class Key(typing.NamedTuple):
    """One key of the configuration.

    Attributes:
        name: Without its section.
        kind: Description of its type.
        default: The default as Python code; empty for a required key.
        meaning: Its description in the docstring of its class.
    """

    name: str
    kind: str
    default: str
    meaning: str


def configuration_page() -> str:
    """The configuration reference, in Markdown."""
    parts = [_CONFIGURATION_INTRO]
    parts += ["## The run\n", _summary(Config), _table(keys_of(Config))]
    for name, section in _sections():
        parts += [f"## {name}\n", _summary(section), _table(keys_of(section))]
        if section is ModelConfig:
            parts += ["### A vision transformer's shape\n", _summary(Architecture), _table(keys_of(Architecture))]
            parts += ["### A RegNet's shape\n", _summary(RegNetArchitecture), _table(keys_of(RegNetArchitecture))]
    return "\n".join(parts)


def keys_of(section: type) -> list[Key]:
    """Returns the keys of a section, without those of the sections in it.

    Raises:
        ValueError: A field has no description in its class's docstring.
    """
    meanings = field_descriptions(section)
    hints = typing.get_type_hints(section, include_extras=True)
    keys = []
    for field in dataclasses.fields(section):
        if field.name not in meanings:
            raise ValueError(f"{section.__name__}.{field.name} has no description in the docstring")
        if _section_of(hints[field.name]) is None:
            default = "" if field.default is dataclasses.MISSING else _python(field.default)
            keys.append(Key(field.name, kind_words(hints[field.name]), default, meanings[field.name]))
    return keys


def field_descriptions(section: type) -> dict[str, str]:
    """What the `Attributes:` of a class's docstring say, each in one line."""
    text = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def kind_words(kind: Any) -> str:
    """A field's type in words: `number, at least 0, below 1`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        limits = [words for item in arguments[1:] for words in _limit_words(item)]
        return ", ".join([kind_words(arguments[0]), *limits])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_words(argument) for argument in arguments)
    if origin is tuple:
        count = "any number of values" if arguments[1:] == (...,) else f"{len(arguments)} values"
        return f"{count}, each a {kind_words(arguments[0])}"
    if origin is collections.abc.Mapping:
        return f"{kind_words(arguments[1])} for each name"
    words = {bool: "`True` or `False`", int: "whole number", float: "number", str: "text", types.NoneType: "`None`"}
    return words[kind]


def _limit_words(item: Any) -> list[str]:
    match item:
        case Ge(bound):
            return [f"at least {bound}"]
        case Gt(bound):
            return [f"above {bound}"]
        case Le(bound):
            return [f"at most {bound}"]
        case Lt(bound):
            return [f"below {bound}"]
        case MinLen():
            return ["not empty"]
        case FieldInfo():
            return [words for inner in item.metadata for words in _limit_words(inner)]
    return []


def _sections() -> Iterator[tuple[str, type]]:
    for name, kind in typing.get_type_hints(Config, include_extras=True).items():
        section = _section_of(kind)
        if section is not None:
            yield name, section


def _section_of(kind: Any) -> type | None:
    """The class of a section, also of one that may be missing; None for plain values."""
    inner = [kind, *typing.get_args(kind)]
    inner += [argument for part in inner for argument in typing.get_args(part)]
    return next((part for part in inner if dataclasses.is_dataclass(part) and isinstance(part, type)), None)


def _python(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_python, value))})"
    # 6 digits: 1e-08 keeps its own, a quotient does not show all of its 17.
    return repr(float(f"{value:.6g}") if isinstance(value, float) else value)


def _summary(section: type) -> str:
    """Returns the docstring above `Attributes:`, and a list of the keys that are sections."""
    text = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")[0].strip() + "\n"
    meanings, hints = field_descriptions(section), typing.get_type_hints(section, include_extras=True)
    within = [name for name, kind in hints.items() if name in meanings and _section_of(kind) is not None]
    if section is Config or not within:
        return text
    if section is ModelConfig:
        return (
            text
            + "\nThe fields of the architecture are keys of this section, too. `family` selects the kind of\n"
            + "architecture.\n"
        )
    listed = "\n".join(f"- `{name}`: {meanings[name]} Its keys are those of [{name}](#{name})." for name in within)
    return f"{text}\nIn addition to the keys of the table:\n\n{listed}\n"


def _table(keys: list[Key]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = f"`{key.default}`" if key.default else "must be given"
        lines.append(f"| `{key.name}` | {key.kind} | {default} | {_cell(key.meaning)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands_page() -> str:
    """The command reference, in Markdown."""
    parts = [_COMMANDS_INTRO]
    for parser in command_parsers(cli.make_parser()):
        parts += [f"## {parser.prog}\n", f"{parser.description}\n", f"```text\n{_usage(parser)}\n```\n"]
        parts += [words_table(parser), *([f"{parser.epilog}\n"] if parser.epilog else [])]
    return "\n".join(parts)


def command_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands under one, in order: `sit train`, ..., `sit data label`."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for child in action.choices.values():
            yield from command_parsers(child)


def words_table(parser: argparse.ArgumentParser) -> str:
    """A Markdown table of a command's arguments.

    Raises:
        ValueError: An argument has no help.
    """
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        if not action.help:
            raise ValueError(f"{parser.prog}: {action.dest} has no help")
        lines.append(f"| `{_word(action)}` | {_default(action)} | {_cell(action.help)} |")
    return "\n".join(lines) + "\n"


def _word(action: argparse.Action) -> str:
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    if not action.option_strings:
        return f"{value} ..." if action.nargs == "+" else str(value)
    return action.option_strings[0] if action.nargs == 0 else f"{action.option_strings[0]} {value}"


def _default(action: argparse.Action) -> str:
    if action.required:
        return "must be given"
    return "" if action.default in (None, False, "", 0, -1) or action.nargs == 0 else f"`{action.default}`"


def _usage(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(parser.prog, width=100)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    return formatter.format_help().strip()


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages that are not in docs/."""
    from mkdocs.structure.files import File

    root = pathlib.Path(config.config_file_path).parent
    texts = {page: (root / place).read_text() for page, place in TAKEN_IN.items()}
    for page, text in {CONFIGURATION: configuration_page(), COMMANDS: commands_page(), **texts}.items():
        files.append(File.generated(config, page, content=text))
    named = set(_named_pages(config.nav))
    rest = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in named)
    if rest:
        config.nav.append({OTHER_PAGES: rest})
    return files


def _named_pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _named_pages(entry)
