"""Export to timm's layout of plain vision transformers (`vit_*`, `deit_*`), its `VisionTransformer`."""

import sys

import numpy as np

from sit_jax.errors import UserError
from sit_jax.io.convert.sit_names import to_original
from sit_jax.io.model import Model

_NORM_EPS = 1e-6


def to_timm(model: Model) -> dict[str, np.ndarray]:
    """Returns a plain ViT's weights as timm's state dict.

    With a distillation token the layout is that of timm's `VisionTransformerDistilled`. The names are the original's,
    except for the distillation token's position, which is stored with the other positions. Raises a UserError if timm
    has no such model; an epsilon of LayerNorms that timm's models do not have would be lost, since no tensor stores it.
    """
    arch = model.vit
    problems = ["is slimmed"] if arch.is_slimmed else []
    problems += [f"has a {arch.stem} stem"] if arch.stem != "patch" else []
    problems += [f"divides its residual branches by {arch.residual_scale:g}"] if arch.residual_scale != 1 else []
    problems += [f"has norm_eps {arch.norm_eps:g} (timm's is {_NORM_EPS:g})"] if arch.norm_eps != _NORM_EPS else []
    if problems:
        raise UserError(f"timm has plain vision transformers only, but this model {', '.join(problems)}")
    state_dict = to_original(model.variables, arch)
    if arch.aux_head:
        print("aux_head is left out: timm has none, and only token labelling uses it", file=sys.stderr)
        state_dict = {name: array for name, array in state_dict.items() if not name.startswith("aux_head.")}
    if arch.distillation_token:
        positions, own = state_dict["pos_embed"], state_dict.pop("dist_pos_embed")
        state_dict["pos_embed"] = np.concatenate([positions[:, :1], own, positions[:, 1:]], axis=1)
    return {name: np.ascontiguousarray(array) for name, array in state_dict.items()}
