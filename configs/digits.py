"""Handwritten digits: a small teacher is trained, then slimmed to a third of its cost. Minutes on two CPU cores."""

from ml_collections import ConfigDict

from sit_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LossConfig,
    OptimConfig,
)
from sit_jax.config.config_dict import defaults, model_section
from sit_jax.models.architecture import Architecture

TEACHER = Architecture(
    image_size=64, in_channels=1, num_classes=10, stem="conv4", dim=48, depth=14, num_heads=3, mlp_ratio=4.0
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = defaults(DataConfig)
    config.data.resampler = "pillow"
    config.augment = defaults(AugmentConfig)
    config.augment.max_rotation, config.augment.max_shift, config.augment.max_zoom = 8.0, 0.06, 0.1

    # The teacher, trained first.
    config.teacher = ConfigDict()
    config.teacher.model = model_section(TEACHER, remat=True)
    config.teacher.epochs = 40
    config.teacher.batch_size = 64
    config.teacher.label_smoothing = 0.1
    config.teacher.optim = defaults(OptimConfig)
    config.teacher.optim.lr = 2e-3
    config.teacher.optim.warmup_epochs = 4.0
    config.teacher.optim.clip_norm = 1.0

    # The student: the same model with three slimming modules, started from the teacher's weights.
    config.model = model_section(TEACHER, remat=True)
    config.model.stage_blocks = (1, 1, 1, 11)
    config.model.keep_ratio = 0.5
    config.init = "teacher"
    config.epochs = 4
    config.batch_size = 64
    config.eval_batch_size = 120
    config.eval_every_epochs = 2
    config.checkpoint = defaults(CheckpointConfig)
    config.checkpoint.every_epochs = 4
    config.optim = defaults(OptimConfig)
    config.optim.lr = 1e-3
    config.optim.warmup_epochs = 1.0
    config.loss = defaults(LossConfig)
    # The paper's weight is 2. This teacher does not divide its residual branches, so its tokens are larger, and their
    # squared error would drown the other terms.
    config.loss.token = 0.1
    config.loss.logits = 2.0
    config.loss.label_smoothing = 0.1
    return config
