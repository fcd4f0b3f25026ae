"""Named models: the paper's five students and their teachers, DeiT and its slimmed students."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from sit_jax.errors import ConfigError
from sit_jax.models.architecture import Architecture, architecture_from_dict

_LVVIT = {"patch_size": 16, "mlp_ratio": 3.0, "qkv_bias": False, "norm_eps": 1e-5, "aux_head": True}
_CONV4 = {"stem": "conv4", "image_size": 224, "residual_scale": 2.0, **_LVVIT}
_CONV6 = {"stem": "conv6", "image_size": 288, "residual_scale": 3.0, **_LVVIT}

# Size -> architecture, blocks per stage at keep ratio 0.5 (table 1 of the paper).
_PAPER: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tiny": ({"dim": 320, "depth": 14, "num_heads": 5, **_CONV4}, (1, 1, 1, 11)),
    "xsmall": ({"dim": 384, "depth": 16, "num_heads": 6, **_CONV4}, (1, 1, 1, 13)),
    "small": ({"dim": 384, "depth": 16, "num_heads": 6, **_CONV4}, (9, 3, 2, 2)),
    "medium": ({"dim": 512, "depth": 20, "num_heads": 8, **_CONV4}, (10, 4, 3, 3)),
    "large": ({"dim": 768, "depth": 24, "num_heads": 12, **_CONV6}, (10, 4, 3, 7)),
}
_DEIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_DEIT_KEEP_RATIOS = (0.9, 0.7, 0.5, 0.25)


def _all_variants() -> dict[str, Architecture]:
    named = {
        f"sit_{size}": Architecture(**shape, stage_blocks=x, keep_ratio=0.5) for size, (shape, x) in _PAPER.items()
    }
    named |= {f"lvvit_{size}": Architecture(**shape) for size, (shape, _) in _PAPER.items()}
    for size, (dim, heads) in _DEIT.items():
        named[f"deit_{size}"] = deit = Architecture(dim=dim, depth=12, num_heads=heads)
        for ratio in _DEIT_KEEP_RATIOS:
            student = dataclasses.replace(deit, stage_blocks=(3, 3, 3, 3), keep_ratio=ratio)
            named[f"deit_{size}_sit_{ratio}"] = student
    return named


VARIANTS: Mapping[str, Architecture] = _all_variants()


def list_models() -> list[str]:
    """Returns the names of all variants: the paper's students, their teachers, DeiT and its students."""
    return list(VARIANTS)


def get_architecture(name: str, **overrides: Any) -> Architecture:
    """Returns the architecture of a named variant, with some fields overridden.

    Raises:
        ConfigError: The name or a field is unknown, or the combination is invalid.
    """
    if name not in VARIANTS:
        close = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; `sit models` lists them"
        raise ConfigError("name", f"there is no model {name!r}{hint}")
    return architecture_from_dict({**dataclasses.asdict(VARIANTS[name]), **overrides})
