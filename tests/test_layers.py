"""The order of the packages: every import points down, none in a circle, those inside functions included."""

import ast
import graphlib
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "sit_jax"
# From the bottom up; a package imports itself and what is before it.
LAYERS = (
    "errors", "ops", "models", "losses", "data", "config", "parallel", "io", "training", "visual", "analysis", "report",
    "demo", "api", "cli",
)  # fmt: skip
# The package itself imports nothing until a name is asked for; `__main__` is the command line.
ENTRIES = ("sit_jax", "sit_jax.__main__")


def imports() -> dict[str, set[str]]:
    """The modules that each module imports."""
    paths = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    modules = {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}: relative import"
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sit_jax":
                full = (f"{node.module}.{alias.name}" for alias in node.names)
                found[name] |= {x if x in modules else node.module for x in full}
    return {name: others - {name, *ENTRIES} for name, others in found.items() if name not in ENTRIES}


def layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


def test_no_import_climbs() -> None:
    climbs = {name: [x for x in others if layer(x) > layer(name)] for name, others in imports().items()}
    assert {name: others for name, others in climbs.items() if others} == {}


def test_no_circles() -> None:
    assert list(graphlib.TopologicalSorter(imports()).static_order())


def test_the_root_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 5
