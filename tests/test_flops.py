"""The cost counter, module by module, against the products that JAX traces."""

import collections
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny

from sit_jax.analysis.flops import Tiles, count_cost, fuller_token_counts
from sit_jax.cli import app as cli
from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.models import build_model, build_rtsm
from sit_jax.models.architecture import Architecture
from sit_jax.models.variants import VARIANTS

# Part -> where its products lie among the modules' names.
PARTS = {"stem": "stem", "attention": "attn", "mlp": "mlp", "slimming": "slimming_", "head": "head", "rtsm": "rtsm"}
INSIDE = "/reducer"


# Up to a fifth of the tokens at a time, which ToMe merges in rounds.
PATCHES = dataclasses.replace(
    tiny.TEACHER, stem="patch", patch_size=4, depth=3, stage_blocks=(1, 1, 1), kept_tokens=(64, 13, 7)
)


def products(jaxpr: Any, place: str = "") -> Iterator[tuple[str, int]]:
    """Names of the modules around each product of a traced function, and its multiply-accumulates."""
    for equation in jaxpr.eqns:
        here = f"{place}/{equation.source_info.name_stack}"
        shapes = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            yield here, math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            # HWIO: each output value takes height x width x input channels.
            assert equation.params["feature_group_count"] == 1
            yield here, math.prod(shapes[-1]) * math.prod(shapes[1][:-1])
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from products(getattr(inner, "jaxpr", inner), here)


def traced(arch: Architecture) -> dict[str, int]:
    """Multiply-accumulates of one image by part."""
    tree = expected_shapes(arch, rtsm=arch.is_slimmed)
    images = jax.ShapeDtypeStruct((1, arch.image_size, arch.image_size, arch.in_channels), jnp.float32)
    variables = {name: tree[name] for name in ("params", "batch_stats") if tree[name]}

    def run(variables: Any, reverse: Any, images: Any) -> Any:
        logits, outputs = build_model(arch).bind(variables)(images)
        if not arch.is_slimmed:
            return logits
        with jax.named_scope("rtsm"):
            return logits, build_rtsm(arch).apply({"params": reverse}, outputs.tokens)

    found: collections.Counter[str] = collections.Counter()
    for place, macs in products(jax.make_jaxpr(run)(variables, tree["rtsm"], images).jaxpr):
        inside = [part for part, name in PARTS.items() if name in place or (part == "slimming" and INSIDE in place)]
        found["rtsm" if "rtsm" in inside else "".join(inside)] += macs
    return dict(found)


@pytest.mark.parametrize(
    "arch",
    [
        VARIANTS["sit_xsmall"],
        dataclasses.replace(VARIANTS["sit_large"], depth=4, stage_blocks=(1, 1, 1, 1)),
        tiny.TEACHER,
        dataclasses.replace(tiny.STUDENT, stem="conv7", stem_width=6, distillation_token=True, kept_tokens=(4, 3)),
        dataclasses.replace(PATCHES, reducer="tome"),
        dataclasses.replace(PATCHES, reducer="evit"),
    ],
    ids=["conv4", "conv6", "teacher", "conv7", "tome", "evit"],
)
def test_each_part_is_the_products_that_are_traced(arch: Architecture) -> None:
    cost = count_cost(arch)
    expected = {**cost.macs, "rtsm": cost.rtsm_macs}
    assert traced(arch) == {part: macs for part, macs in expected.items() if macs}


def test_parts_add_up_in_the_list_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(VARIANTS)
    for row in rows.values():
        parts = sum(macs for part, macs in row["macs"].items() if part != "rtsm")
        assert parts / 1e9 == pytest.approx(row["gmac"], abs=1e-4)
    assert cli.main(["models", "--verbose"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sit_xsmall"))
    assert f"{rows['sit_xsmall']['macs']['rtsm'] / 1e9:.4f}" in line.split()


def test_padding_of_tiles() -> None:
    arch = Architecture(
        num_classes=0, dim=64, depth=2, num_heads=4, stage_blocks=(1, 1), keep_ratio=0.25, image_size=64
    )
    # 16 patches and the class token take 24 rows and 128 lanes, the 4 kept ones and theirs 8 and 128.
    whole, padded = count_cost(arch), count_cost(arch, Tiles(8, 128))
    assert whole.macs["attention"] == (17 + 5) * 4 * 64**2 + 2 * (17**2 + 5**2) * 64
    assert padded.macs["attention"] == (24 + 8) * 4 * 64**2 + 2 * (24 + 8) * 128 * 64
    assert padded.macs["mlp"] == (24 + 8) * 8 * 64**2
    assert padded.macs["slimming"] == 16 * (64 * 32 + 32 * 128) + 16 * 128 * 64
    # The reverse module behind each block: over tokens 4 -> 64 -> 16, all lanes, then 16 rows of 64 channels.
    assert padded.rtsm_macs == 2 * (64 * (128 * 128 + 128 * 128) + 16 * 8 * 64**2)
    assert (whole.params, whole.macs["stem"]) == (padded.params, padded.macs["stem"])


def test_token_counts_that_fill_their_tiles() -> None:
    assert fuller_token_counts(VARIANTS["sit_tiny"]) == {98: (95, 103), 49: (47, 55), 24: (23, 31)}
    full = Architecture(stage_blocks=(6, 6), kept_tokens=(196, 95))
    assert fuller_token_counts(full) == {}
    assert fuller_token_counts(dataclasses.replace(full, kept_tokens=(196, 3))) == {3: (7,)}
    assert fuller_token_counts(full.without_slimming()) == {}
