"""Your own images: a ViT is trained (or fine-tuned) on a folder of them, then slimmed to about half its cost.

The folder holds `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, or `CLASS/*.jpg`, of which a tenth is then held out. The
number of classes and their names come from it. The image size is given after a colon; the default is 224. It is a
multiple of 16, or, for patches of 4 pixels, a multiple of 4 from 12 to 44. Look at the images first: `sit data check`,
`sit data show`. Expect what a small ViT makes of as many images as you have: with
few, start the teacher from a trained one of the same shape (`--config.teacher.init=RUN`; its head may have other
classes). Hardware: one GPU or TPU chip at 224 pixels; at 64 pixels two CPU cores train some 100 images per second.

    sit train --config configs/folder.py:64 --workdir runs/mine --config.data.data_dir=images
"""

from ml_collections import ConfigDict

from sit_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LossConfig,
    MixConfig,
    OptimConfig,
)
from sit_jax.config.config_dict import defaults, model_section
from sit_jax.models.architecture import Architecture


def get_config(image_size: str = "224") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = defaults(DataConfig)
    config.data.name = "folder"
    config.data.eval_split = "val"
    config.data.resize = "crop"
    config.augment = defaults(AugmentConfig)
    config.augment.crop_scale = (0.35, 1.0)
    config.augment.flip = 0.5
    config.augment.rand_augment = "rand-m5-mstd0.5-inc1"
    config.mix = defaults(MixConfig)
    config.mix.mixup = 0.2
    config.mix.cutmix = 0.5
    config.mix.probability = 0.5

    # The teacher, trained first. Zero classes: as many as the folder has.
    size = int(image_size)
    # The convolutional stem has patches of 16 pixels, which leave small images too few tokens to slim.
    stem = {"stem": "conv4"} if size >= 48 else {"stem": "patch", "patch_size": 4}
    shape = Architecture(image_size=size, num_classes=0, dim=192, depth=12, num_heads=3, **stem)
    config.teacher = ConfigDict()
    config.teacher.model = model_section(shape)
    config.teacher.epochs = 30
    config.teacher.batch_size = 64
    config.teacher.label_smoothing = 0.1
    config.teacher.optim = defaults(OptimConfig)
    config.teacher.optim.lr = 1e-3
    config.teacher.optim.lr_batch_size = 64
    config.teacher.optim.warmup_epochs = 3.0
    config.teacher.optim.clip_norm = 1.0

    # The student: the same model with three slimming modules, started from the teacher's weights.
    config.model = model_section(shape)
    config.model.stage_blocks = (3, 3, 3, 3)
    config.model.keep_ratio = 0.5
    config.init = "teacher"
    config.epochs = 10
    config.batch_size = 64
    config.eval_batch_size = 64
    config.eval_every_epochs = 2
    config.checkpoint = defaults(CheckpointConfig)
    config.checkpoint.every_epochs = 2
    config.optim = defaults(OptimConfig)
    config.optim.lr = 5e-4
    config.optim.lr_batch_size = 64
    config.optim.warmup_epochs = 1.0
    config.loss = defaults(LossConfig)
    # The paper's weight is 2, for teachers that divide their residual branches; see configs/digits.py.
    config.loss.token = 0.1
    config.loss.logits = 2.0
    config.loss.label_smoothing = 0.1
    return config
