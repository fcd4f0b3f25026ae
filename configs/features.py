"""A backbone without labels: a DINOv2, CLIP, SigLIP or MAE is slimmed to a third of its cost and keeps its features.

The argument after the colon is the backbone: a folder or file of Hugging Face, timm or OpenCLIP, a model folder or a
run. The images are a folder with any subfolders, or a text file of paths; a tenth is held out. Evaluation says how
similar the student's features are to the backbone's. Expect to need at least some ten thousand images of the kind that
the student will see. Hardware: one GPU or TPU chip, there with `--config.model.dtype=bfloat16` and
`--config.teacher.model.dtype=bfloat16`.

    sit train --config configs/features.py:models/dinov2-small --workdir runs/small --config.data.data_dir=images
"""

import dataclasses

from ml_collections import ConfigDict

from sit_jax.analysis.flops import count_cost
from sit_jax.config import AugmentConfig, CheckpointConfig, DataConfig, LossConfig, OptimConfig
from sit_jax.config.config_dict import defaults, model_section
from sit_jax.errors import ConfigError
from sit_jax.io.load import read_weights
from sit_jax.io.metadata import complete_metadata
from sit_jax.models.architecture import Architecture


def get_config(backbone: str = "") -> ConfigDict:
    if not backbone:
        raise ValueError("give the folder of the backbone after a colon, such as features:models/dinov2-small")
    model = read_weights(backbone)
    # Features need no head.
    teacher = dataclasses.replace(model.vit, num_classes=0)

    config = ConfigDict()
    config.seed = 0
    # Images are read as the backbone was trained to read them.
    preprocessing = complete_metadata(model.metadata, teacher.in_channels)["preprocessing"]
    config.data = defaults(DataConfig)
    for key, value in preprocessing.items():
        config.data[key] = tuple(value * (3 // len(value))) if key in ("mean", "std") else value
    config.data.name = "images"
    config.data.eval_split = "val"
    config.augment = defaults(AugmentConfig)
    config.augment.crop_scale = (0.35, 1.0)
    config.augment.flip = 0.5

    config.teacher = ConfigDict({"model": model_section(teacher), "run": backbone})
    config.model = model_section(slimmed(teacher, 1 / 3))
    config.init = "teacher"
    config.epochs = 30
    config.batch_size = 64
    config.eval_batch_size = 64
    config.checkpoint = defaults(CheckpointConfig)
    config.optim = defaults(OptimConfig, lr=2e-4, lr_batch_size=64, min_lr=1e-6, warmup_epochs=1.0, clip_norm=1.0)
    # The paper's weight of the tokens is 2, for teachers that divide their residual branches; see configs/digits.py.
    config.loss = defaults(LossConfig, classification=0.0, token=0.1, feature=1.0)
    # Embeddings of CLIP and SigLIP are compared by their direction.
    config.loss.feature_error = "cosine" if teacher.projection or teacher.pool == "map" else "mse"
    return config


def slimmed(teacher: Architecture, fraction: float) -> Architecture:
    """Returns the student whose cost is closest to a fraction of the teacher's.

    The first of its four stages, which works on all tokens, is a sixth of the blocks; the others are equal.
    """
    first = max(1, teacher.depth // 6)
    others = min(3, teacher.depth - first)
    if teacher.is_slimmed or not others:
        raise ValueError("the backbone must have at least two blocks and no slimming modules")
    rest = teacher.depth - first
    stages = (first, *(rest * (i + 1) // others - rest * i // others for i in range(others)))
    students = []
    for percent in range(20, 91):
        try:
            students.append(dataclasses.replace(teacher, stage_blocks=stages, keep_ratio=percent / 100))
        except ConfigError:  # No token would be left.
            continue
    if not students:
        raise ValueError(f"the backbone has too few tokens, {teacher.num_patches}, to be slimmed")
    wanted = fraction * count_cost(teacher).gmac
    return min(students, key=lambda student: abs(count_cost(student).gmac - wanted))
