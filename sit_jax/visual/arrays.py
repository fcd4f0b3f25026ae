"""Token maps as named arrays, for custom plots."""

import numpy as np
from numpy import ndarray

from sit_jax.visual.token_maps import TokenMaps


def arrays_of(pixels: ndarray, maps: TokenMaps, index: int) -> dict[str, ndarray]:
    """Returns all arrays of one image of a batch, without the batch axis.

    `pixels` (size, size, channels) is the model's input; `logits` and `probabilities` (classes,); `class_attention`
    (blocks, patches), distributed to the patches; `token_counts` (blocks,), the patch tokens of each block. For each
    slimming module n from 1: `assignment_n` (tokens, kept); `cumulative_n` (kept, patches); `hard_n` (patches,);
    `overlooked_n` (patches,); `effective_patches_n` (kept,); `token_attention_n` (kept,). See `StageMaps`.
    """
    found: dict[str, ndarray] = {
        "pixels": pixels,
        "logits": maps.logits[index],
        "probabilities": maps.probabilities[index],
        "class_attention": np.stack(
            [maps.attention_on_patches(block)[index] for block in range(1, len(maps.attention) + 1)]
        ),
        "token_counts": np.array([weights.shape[1] for weights in maps.attention]),
    }
    for number, stage in enumerate(maps.stages, start=1):
        own = {
            "assignment": stage.assignment,
            "cumulative": stage.cumulative,
            "hard": stage.hard,
            "overlooked": stage.overlooked,
            "effective_patches": stage.effective_patches,
            "token_attention": maps.token_attention(number - 1),
        }
        found |= {f"{name}_{number}": values[index] for name, values in own.items()}
    return found
