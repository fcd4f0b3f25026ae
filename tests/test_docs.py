"""The documentation says what is: its commands parse, its reference is whole, its messages are the source's."""

import argparse
import ast
import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest
import reference_pages

from sit_jax.cli import app as cli
from sit_jax.cli.config_file import load_config
from sit_jax.config import Config
from sit_jax.data.config import DataConfig
from sit_jax.models.architecture import Architecture

PAGES = [pathlib.Path("README.md"), *sorted(pathlib.Path("docs").rglob("*.md"))]
PYPROJECT = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
# What starts a command that only a cluster or a cloud can run; test_launch.py runs launch/'s scripts dry.
ELSEWHERE = ("gcloud", "sbatch", "bash", "launch/")


def shell_lines(page: pathlib.Path) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def own_pages(page: pathlib.Path, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Configurations that a page shows, written into files under the names that it gives them."""
    written = {}
    for text in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if "def get_config" in text:
            (name,) = re.findall(r"`(\w+\.py)`", page.read_text().split(text)[0])[-1:] or ["page.py"]
            written[name] = folder / name
            written[name].write_text(text)
    return written


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pages = own_pages(page, tmp_path)
    for words in shell_lines(page):
        match words:
            case ["sit", *rest]:
                arguments, overrides = cli.make_parser().parse_known_args(rest)
                if "config" in arguments:
                    load_config(str(pages.get(arguments.config, arguments.config)), overrides)
                else:
                    assert overrides == [], words
            case ["make", *targets]:
                makefile = pathlib.Path("Makefile").read_text()
                assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), words
            case ["pip", "install", *packages]:
                for extra in re.findall(r"(?:sit-jax|\.)\[(\w+)\]", " ".join(packages)):
                    assert extra in PYPROJECT["project"]["optional-dependencies"], words
            case ["python", script, *_]:
                assert pathlib.Path(script).is_file(), words  # Tested where it is.
            case _:
                assert words[0].startswith(ELSEWHERE), words


def test_every_verb_is_shown() -> None:
    verbs = {words[1] for page in PAGES for words in shell_lines(page) if words[0] == "sit"}
    assert verbs == {parser.prog.split()[1] for parser in reference_pages.command_parsers(cli.make_parser())}


def test_snippets_are_run_somewhere() -> None:
    # Here, as doctests (test_readme.py), and page by page in the tests of what they show.
    tested = {"README.md", "deploy.md", "extend.md", "own_pictures.md", "visualize.md"}
    assert {page.name for page in PAGES if "```python" in page.read_text()} <= tested


def test_overrides() -> None:
    # Words in the text and in tables, which stand in no command. Paths of runs are not looked at here.
    found = 0
    for page in PAGES:
        config = "configs/folder.py:64" if page.name == "own_pictures.md" else "configs/digits.py"
        for code in re.findall(r"`(--config\.[a-z][\w.]*=[^`]+)`", page.read_text()):
            load_config(config, shlex.split(code))
            found += 1
    assert found >= 20


def test_every_key_is_described() -> None:
    page = reference_pages.configuration_page()
    for name, section in [("the run", Config), *reference_pages._sections()]:
        keys = reference_pages.keys_of(section)
        described = reference_pages.field_descriptions(section)
        assert set(described) >= {field.name for field in dataclasses.fields(section)}, name
        for key in keys:
            assert key.kind, key
            assert f"| `{key.name}` | {key.kind} | " in page
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert {field.name for field in dataclasses.fields(Architecture)} <= set(rows)
    assert "| `crop_fraction` | number, above 0, at most 1 | `0.875` |" in page
    assert "| `on_decode_error` | `error` or `skip` | `'error'` |" in page
    assert "| `eps` | number, above 0 | `1e-08` |" in page
    assert "| `std` | 3 values, each a number, above 0 | `(0.229, 0.224, 0.225)` |" in page


def test_an_undescribed_key_stops_the_build() -> None:
    @dataclasses.dataclass
    class Section:
        """One.

        Attributes:
            told: Something.
        """

        told: int = 1
        untold: int = 2

    with pytest.raises(ValueError, match=r"Section\.untold has no description"):
        reference_pages.keys_of(Section)
    assert reference_pages.field_descriptions(DataConfig)["resize"].startswith("How an image becomes a square")


def test_every_command_and_word_is_told() -> None:
    page = reference_pages.commands_page()
    parsers = list(reference_pages.command_parsers(cli.make_parser()))
    assert {"sit train", "sit data label", "sit checkpoint verify"} <= {parser.prog for parser in parsers}
    for parser in parsers:
        section = page.partition(f"## {parser.prog}\n")[2].partition("\n## ")[0]
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS:
                assert action.help
                assert action.help.replace("|", "\\|") in section, (parser.prog, action.dest)


def templates(node: ast.AST) -> Iterator[str]:
    """Every text in a program, `…` where a value is filled in; fields and problems of `_require` joined."""
    for part in ast.walk(node):
        text = template(part)
        if text:
            yield text


def template(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join("…" if isinstance(value, ast.FormattedValue) else template(value) for value in values)
        case ast.Call(func=ast.Name(id="ConfigError"), args=[key, problem]):
            return f"{template(key) or '…'}: {template(problem) or '…'}"
        case ast.BinOp(left=left, right=right):
            return (template(left) or "…") + (template(right) or "…")
    return ""


def test_quoted_messages_are_the_sources() -> None:
    quoted = re.findall(r"^\| `([^`]+)` \|", pathlib.Path("docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 60
    known = [text for file in pathlib.Path("sit_jax").rglob("*.py") for text in templates(ast.parse(file.read_text()))]
    squeezed = "\n".join(re.sub("…+", "…", text) for text in known)
    unknown = [message for message in quoted if re.sub("^…|…$", "", message) not in squeezed]
    assert unknown == []


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: pathlib.Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "launch.html", "reference/api.html"} <= set(pages)
    for name, html in pages.items():
        # Links may lead anywhere; whatever a browser loads by itself may not.
        loaded = re.findall(
            r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", html
        )
        assert loaded == [], name
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style.name
    api = pages["reference/api.html"]
    assert 'id="sit_jax.api.slim"' in api
