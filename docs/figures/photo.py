"""The model behind the photographs of docs/figures: a small ViT that finds a dahlia or a pagoda, and its student.

Trained on what make_crops.py makes of two photographs, on 14 x 14 patches like ImageNet's models; 196 tokens become 64,
24 and 8. Two CPU cores take some minutes.

    python docs/figures/make_crops.py build/photo
    sit train --config docs/figures/photo.py --workdir build/photo/run --config.data.data_dir=build/photo/images
"""

from ml_collections import ConfigDict

from sit_jax.config import AugmentConfig, CheckpointConfig, DataConfig, LossConfig, OptimConfig
from sit_jax.config.config_dict import defaults, model_section
from sit_jax.models.architecture import Architecture

TEACHER = Architecture(image_size=112, patch_size=8, num_classes=3, dim=48, depth=5, num_heads=3, mlp_ratio=2.0)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = defaults(DataConfig)
    config.data.name, config.data.eval_split, config.data.resize = "folder", "val", "crop"
    config.augment = defaults(AugmentConfig)
    config.augment.crop_scale, config.augment.flip, config.augment.color_jitter = (0.7, 1.0), 0.5, 0.2
    config.teacher = ConfigDict()
    config.teacher.model = model_section(TEACHER)
    config.teacher.epochs = 6
    config.teacher.batch_size = 32
    config.teacher.label_smoothing = 0.1
    config.teacher.optim = defaults(OptimConfig)
    config.teacher.optim.lr, config.teacher.optim.lr_batch_size = 2e-3, 32
    config.teacher.optim.warmup_epochs, config.teacher.optim.clip_norm = 1.0, 1.0
    config.model = model_section(TEACHER)
    config.model.stage_blocks, config.model.kept_tokens = (2, 1, 1, 1), (196, 64, 24, 8)
    config.init = "teacher"
    config.epochs = 12
    config.batch_size = 32
    config.eval_batch_size = 50
    config.eval_every_epochs = 6
    config.checkpoint = defaults(CheckpointConfig)
    config.checkpoint.every_epochs = 6
    config.optim = defaults(OptimConfig)
    config.optim.lr, config.optim.lr_batch_size, config.optim.warmup_epochs = 3e-3, 32, 1.0
    config.loss = defaults(LossConfig)
    config.loss.token, config.loss.logits, config.loss.label_smoothing = 0.5, 2.0, 0.1
    return config
