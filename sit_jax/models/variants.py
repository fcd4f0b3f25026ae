"""Named models: the paper's five students and their teachers, DeiT and its slimmed students."""

from collections.abc import Mapping
from dataclasses import asdict, replace

from sit_jax.errors import did_you_mean, require
from sit_jax.models.architecture import Architecture, architecture_from_dict

_CONV4 = Architecture(stem="conv4", residual_scale=2.0, mlp_ratio=3.0, qkv_bias=False, norm_eps=1e-5, aux_head=True)
_CONV6 = replace(_CONV4, stem="conv6", image_size=288, residual_scale=3.0)

# Size -> teacher, and the student's blocks per stage at keep ratio 0.5 (table 1 of the paper).
_PAPER = {
    "tiny": (replace(_CONV4, dim=320, depth=14, num_heads=5), (1, 1, 1, 11)),
    "xsmall": (replace(_CONV4, dim=384, depth=16, num_heads=6), (1, 1, 1, 13)),
    "small": (replace(_CONV4, dim=384, depth=16, num_heads=6), (9, 3, 2, 2)),
    "medium": (replace(_CONV4, dim=512, depth=20, num_heads=8), (10, 4, 3, 3)),
    "large": (replace(_CONV6, dim=768, depth=24, num_heads=12), (10, 4, 3, 7)),
}
_DEIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_DEIT_KEEP_RATIOS = (0.9, 0.7, 0.5, 0.25)


def _all_variants() -> dict[str, Architecture]:
    named = {
        f"sit_{size}": replace(teacher, stage_blocks=blocks, keep_ratio=0.5)
        for size, (teacher, blocks) in _PAPER.items()
    }
    named |= {f"lvvit_{size}": teacher for size, (teacher, _) in _PAPER.items()}
    for size, (dim, heads) in _DEIT.items():
        named[f"deit_{size}"] = deit = Architecture(dim=dim, depth=12, num_heads=heads)
        for ratio in _DEIT_KEEP_RATIOS:
            named[f"deit_{size}_sit_{ratio}"] = replace(deit, stage_blocks=(3, 3, 3, 3), keep_ratio=ratio)
    return named


VARIANTS: Mapping[str, Architecture] = _all_variants()


def list_models() -> list[str]:
    """Returns the names of all variants: the paper's students, their teachers, DeiT and its students."""
    return list(VARIANTS)


def get_architecture(name: str, **overrides: object) -> Architecture:
    """Returns the architecture of a named variant, with some fields overridden.

    Raises:
        ConfigError: The name or a field is unknown, or the combination is invalid.
    """
    hint = did_you_mean(name, VARIANTS, "; `sit models` lists them")
    require(name in VARIANTS, "name", f"there is no model {name!r}{hint}")
    return architecture_from_dict({**asdict(VARIANTS[name]), **overrides})
