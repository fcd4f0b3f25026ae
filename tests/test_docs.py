"""The documentation says what is: its commands parse, its reference is whole, its messages are the source's."""

import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import reference_pages

from sit_jax.cli import app as cli
from sit_jax.cli.config_file import load_config
from sit_jax.config import Config, OptimConfig
from sit_jax.data.config import DataConfig
from sit_jax.models.architecture import Architecture

PAGES = [pathlib.Path("README.md"), *sorted(pathlib.Path("docs").rglob("*.md"))]
PYPROJECT = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
BACKBONE = "tests/golden/backbones/hf_dinov2"
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
                if arguments.verb == "tune" and arguments.output:
                    pages[str(arguments.output)] = pathlib.Path("configs/digits.py")  # The command writes one.
                if "config" in arguments:
                    # The backbones that the pages name are not here.
                    config = re.sub(r"^(.*\bfeatures(\.py)?):.*", rf"\1:{BACKBONE}", arguments.config)
                    load_config(str(pages.get(config, config)), overrides)
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
    tested = {"compare", "deploy", "extend", "features", "own_images", "speed", "visualize", "README"}
    assert {page.stem for page in PAGES if "```python" in page.read_text()} <= tested


def test_overrides() -> None:
    # Words in the text and in tables, which stand in no command. Paths of runs are not looked at here.
    found = 0
    for page in PAGES:
        config = "configs/folder.py:64" if page.name == "own_images.md" else "configs/digits.py"
        for code in re.findall(r"`(--config\.[a-z][\w.]*=[^`]+)`", page.read_text()):
            load_config(config, shlex.split(code))
            found += 1
    assert found >= 20


def test_every_key_is_described() -> None:
    page = reference_pages.configuration_page()
    named = set(re.findall(r"^(?:\| `|## )(\w+)", page, re.MULTILINE))
    for section in (Config, DataConfig, OptimConfig, Architecture):
        assert {field.name for field in dataclasses.fields(section)} <= named
    for row in (
        "| `crop_fraction` | number, above 0, at most 1 | `0.875` |",
        "| `on_decode_error` | `error` or `skip` | `'error'` |",
        "| `eps` | number, above 0 | `1e-08` |",
        "| `std` | 3 values, each a number, above 0 | `(0.229, 0.224, 0.225)` |",
    ):
        assert row in page

    @dataclasses.dataclass
    class Section:
        """A section whose key has no description."""

        untold: int = 2

    with pytest.raises(ValueError, match=r"Section\.untold"):
        reference_pages.keys_of(Section)


def test_every_argument_is_described() -> None:
    page = reference_pages.commands_page()
    for parser in reference_pages.command_parsers(cli.make_parser()):
        section = page.partition(f"## {parser.prog}\n")[2].partition("\n## ")[0]
        options = set(re.findall(r"--[a-z_.]+", parser.format_usage()))
        assert options <= set(re.findall(r"^\| `(--[a-z_.]+)", section, re.MULTILINE)), parser.prog


def test_quoted_messages_are_the_sources() -> None:
    quoted = re.findall(r"^\| `([^`]+)` \|", pathlib.Path("docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 60
    source = "".join(file.read_text() for file in pathlib.Path("sit_jax").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?r?"', "", source).replace('\\"', '"')
    # `…` is where a value is filled in; a ConfigError has its key before the colon.
    parts = {part for message in quoted for part in re.split("…|: ", message)}
    assert [part for part in sorted(parts) if part not in source] == []


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
