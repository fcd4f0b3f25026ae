"""The paper's training recipe on ImageNet, as ConfigDicts that the config files in `configs/` are based on.

Reference: section 4.1 of 'Self-slimmed Vision Transformer' and the original's training scripts.
"""

from ml_collections import ConfigDict

from sit_jax.config import AugmentConfig, DataConfig, LossConfig, MixConfig, OptimConfig
from sit_jax.config.config_dict import defaults, named_model


def imagenet(batch_size: int = 1024) -> ConfigDict:
    """Returns data, augmentation and mixing on ImageNet, for teachers and students; without model and optimizer."""
    config = ConfigDict()
    config.seed = 0
    config.data = defaults(DataConfig, name="imagenet2012", eval_split="validation", resize="crop", workers=16)
    config.augment = defaults(AugmentConfig, flip=0.5, rand_augment="rand-m9-mstd0.5-inc1", erase=0.25, repeats=3)
    config.mix = defaults(MixConfig, mixup=0.8, cutmix=1.0)
    config.batch_size = batch_size
    config.eval_batch_size = batch_size
    config.eval_every_epochs = 1
    config.loss = defaults(LossConfig, label_smoothing=0.1)
    return config


def distillation(student: str, teacher: str, teacher_run: str, drop_path: float) -> ConfigDict:
    """Returns the config for distilling a named student from a named teacher on ImageNet.

    Args:
        student: Name of the slimmed variant.
        teacher: Name of its un-slimmed teacher.
        teacher_run: Run directory of the teacher.
        drop_path: Stochastic depth rate of the student.
    """
    config = imagenet()
    config.model = named_model(student, drop_path=drop_path, dtype="bfloat16")
    config.teacher = ConfigDict({"model": named_model(teacher, dtype="bfloat16"), "run": teacher_run})
    config.init = "teacher"
    config.epochs = 125
    config.optim = defaults(OptimConfig, lr=2e-4, lr_batch_size=512, min_lr=1e-5, rtsm_lr_scale=5.0)
    config.optim.cooldown_epochs = 10
    config.optim.schedule_per = "epoch"
    config.loss.token = config.loss.logits = 2.0
    return config


def teacher(name: str, drop_path: float, mode: str) -> ConfigDict:
    """Returns the config for training a named teacher on ImageNet.

    Args:
        name: Name of the teacher.
        drop_path: Stochastic depth rate of the teacher.
        mode: `finetune` trains for 30 epochs from the run that `init` names; `scratch` trains for LV-ViT's 300.
    """
    config = imagenet()
    config.model = named_model(name, drop_path=drop_path, dtype="bfloat16")
    config.optim = defaults(OptimConfig, lr_batch_size=1024)
    config.init = "random"
    if mode == "scratch":
        config.epochs = 300
        config.optim.lr = 1.6e-3
        config.optim.warmup_epochs = 5.0
        config.optim.cooldown_epochs = 10
    elif mode == "finetune":
        config.init = f"runs/{name}_pretrained"
        config.epochs = 30
        config.optim.lr = 2e-5
        config.optim.min_lr = 1e-6
        config.optim.weight_decay = 1e-8
    else:
        raise ValueError(f"{mode!r} is neither finetune nor scratch")
    return config


def token_labelling(config: ConfigDict, label_maps: str) -> ConfigDict:
    """Adds LV-ViT's token labelling to a teacher's config: MixToken instead of mixup and CutMix, and dense labels."""
    config.data.label_maps = label_maps
    config.loss.token_label = 0.5
    config.mix.update(mixup=0.0, cutmix=0.0, mix_token=1.0)
    return config
