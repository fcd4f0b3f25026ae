"""Where a digits student looks: the fraction of its tokens' weight that lies on strokes, against the strokes' area.

    python benchmarks/strokes.py runs/digits

A patch is a stroke patch where its mean level is above half of white. Over the whole test split: the stroke patches'
share of the image (area), their share of the cumulative weight of all tokens behind each slimming module, and of the
class token's attention in each block. Also the same per token of the first module, since tokens share the work.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from sit_jax.data.registry import open_source
from sit_jax.errors import UserError
from sit_jax.io.load import load
from sit_jax.visual.model_input import preprocess
from sit_jax.visual.token_maps import model_token_maps

STROKE = 0.5


def measure(folder: pathlib.Path, data_dir: str | None = None) -> dict[str, Any]:
    """The figures of one run; shares of 1.

    Args:
        folder: The student's run.
        data_dir: Where the digits lie, if not where they lay in training.

    Raises:
        UserError: There is no run, or its model slims nothing.
    """
    model = load(folder)
    if not model.vit.is_slimmed:
        raise UserError(f"{folder}: this model has no slimming modules; give a student's run")
    data = model.data if data_dir is None else dataclasses.replace(model.data, data_dir=data_dir)
    source = open_source(data, data.eval_split)
    pixels = np.stack([preprocess(model.vit, model.data, source[index]).pixels for index in range(len(source))])
    maps = model_token_maps(model, pixels)
    rows, columns = maps.grid
    side = pixels.shape[1] // rows
    levels = pixels.reshape(len(pixels), rows, side, columns, side).mean(axis=(2, 4)).reshape(len(pixels), -1)
    strokes = levels / 255 > STROKE

    def share(weights: np.ndarray) -> float:
        """Of the weight (images, patches) on strokes."""
        return float((weights * strokes).sum() / weights.sum())

    first = maps.stages[0].cumulative
    return {
        "pictures": len(pixels),
        "area": float(strokes.mean()),
        "weight": [share(stage.cumulative.mean(axis=1)) for stage in maps.stages],
        "weight_of_each_first_token": [share(first[:, token]) for token in range(first.shape[1])],
        "class_attention": [share(maps.attention_on_patches(block + 1)) for block in range(len(maps.attention))],
        "effective_patches": [float(stage.effective_patches.mean()) for stage in maps.stages],
    }


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="folder of a digits student's run")
    parser.add_argument("--data_dir", help="where the digits lie, if not where they lay in training")
    arguments = parser.parse_args()
    try:
        found = measure(arguments.run, arguments.data_dir)
    except UserError as error:
        parser.error(str(error))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
