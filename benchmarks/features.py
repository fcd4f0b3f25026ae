"""Features of a slimmed backbone beside its teacher's and those of random slimming modules.

    python benchmarks/features.py RUN [--name DATA --data_dir FOLDER]

RUN is a run of `configs/features.py`. Prints JSON: GMAC, cosine similarity with the teacher's pooled features,
agreement of nearest neighbours and, on data with classes, the accuracy of a k-NN vote and a linear probe; then the
mean cosine similarity of the patch tokens on the full grid, by `rtsm` and by `spread`, over at most 1,000 held-out
images.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from typing import get_args

import numpy as np

import sit_jax
from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.probe import probe_models
from sit_jax.analysis.summary import trained_teacher
from sit_jax.data.registry import open_source
from sit_jax.io.model import Model
from sit_jax.models.features import Features, Grid
from sit_jax.training.evaluate import feature_comparison
from sit_jax.training.metrics import unit_vectors
from sit_jax.visual.model_input import preprocess


def main() -> None:
    """Compares the three models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=pathlib.Path)
    parser.add_argument("--name", help="data set with classes, for the probes; the run's own if not given")
    parser.add_argument("--data_dir", help="its folder")
    arguments = parser.parse_args()

    student = sit_jax.load(arguments.run)
    teacher = trained_teacher(student, arguments.run)
    assert teacher is not None
    ends = list(itertools.accumulate(student.vit.stage_blocks))[:-1]
    random = sit_jax.slim(teacher, student.vit.keep_ratio or 0.5, ends)
    models = {"teacher": teacher, "student": student, "random": dataclasses.replace(random, config=student.config)}
    changes = {key: value for key in ("name", "data_dir") if (value := getattr(arguments, key))}
    data = dataclasses.replace(student.data, **changes)
    probes = probe_models(models, data) if data.name != "images" else {}
    compare = feature_comparison(teacher, student.data, student.source)
    result = {
        name: {
            "gmac": count_cost(model.vit).gmac,
            **({} if model is teacher else compare(model)),
            **probes.get(name, {}),
        }
        for name, model in models.items()
    }
    result["grid"] = grid_similarities(arguments.run, teacher)
    print(json.dumps(result, indent=2))


def grid_similarities(run: pathlib.Path, teacher: Model) -> dict[str, float]:
    """Returns the mean cosine similarity of patch tokens with the teacher's, for each way back to the full grid."""
    student = sit_jax.load(run, with_rtsm=True)
    source = open_source(student.data, student.data.eval_split)
    indices = range(min(1000, len(source)))
    pixels = np.stack([preprocess(student.vit, student.data, source[index]).pixels for index in indices])
    grids: tuple[Grid, ...] = get_args(Grid)
    found: dict[str, Features] = {"teacher": teacher.features(pixels)}
    found |= {grid: student.features(pixels, grid) for grid in grids}
    tokens = {name: unit_vectors(np.concatenate(np.asarray(x.patch_tokens))) for name, x in found.items()}
    return {grid: float((tokens[grid] * tokens["teacher"]).sum(axis=1).mean()) for grid in grids}


if __name__ == "__main__":
    main()
