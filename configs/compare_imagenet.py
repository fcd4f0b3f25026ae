"""Token reducers for DeiT-S on ImageNet: slim, ToMe, Top-K and EViT, at two thirds and a half of the teacher's cost.

The recipe is the fine-tuning of EViT, whose 30 epochs DynamicViT has as well: batch 1024, AdamW, learning rate 2e-5 per
512 images with a cosine to 2e-6, no warm-up, weight decay 1e-6, and DeiT's augmentation. Its accuracies, and those that
others report for DeiT-S, are in the figure. Reproduced here: not yet. Hardware: 8 GPUs, one training on each; not
measured, `--config.optim.accumulate_steps` saves memory. The teacher is a run of `deit_small`, or published weights,
in `teacher.run`.

    sit compare --config configs/compare_imagenet.py --workdir runs/compare_imagenet --parallel 8 \\
        --config.teacher.run=runs/deit_small
"""

from ml_collections import ConfigDict

from sit_jax.config import OptimConfig, Reported, Sweep
from sit_jax.config.config_dict import defaults
from sit_jax.config.recipe import distillation

# Reducers at blocks 4, 7 and 10, as in EViT and DynamicViT.
STAGE_BLOCKS = (4, 3, 3, 2)
# 3.0 and 2.3 of 4.6 GMAC; 3.2 and 2.5 with slim, which reduces after the block's MLP and not before it.
KEEP_RATIOS = (0.7, 0.5)


def get_config() -> ConfigDict:
    config = distillation("deit_small_sit_0.7", "deit_small", teacher_run="runs/deit_small", drop_path=0.1)
    config.model.stage_blocks = STAGE_BLOCKS
    config.epochs = 30
    config.optim = defaults(OptimConfig, lr=2e-5, lr_batch_size=512, min_lr=2e-6, weight_decay=1e-6)
    # See configs/digits.py.
    config.loss.token = 0.1
    return config


def get_sweep() -> Sweep:
    return Sweep(
        reducers=("slim", "tome", "topk", "evit"),
        keep_ratios=KEEP_RATIOS,
        objectives=("frd", "ce", "untrained"),
        seeds=(0,),
        batch_sizes=(1, 128),
        # From the READMEs of the methods' repositories; ToMe's GMAC are counted.
        reported=(
            Reported("DeiT-S", 4.6, 0.798),
            Reported("Top-K 0.7", 3.0, 0.794),
            Reported("Top-K 0.5", 2.3, 0.784),
            Reported("EViT 0.7", 3.0, 0.795),
            Reported("EViT 0.5", 2.3, 0.785),
            Reported("ToMe r=13", 2.7, 0.794),
            Reported("DynamicViT 0.7", 2.9, 0.793),
            Reported("DiffRate", 2.9, 0.795),
            Reported("PPT", 2.9, 0.795),
            Reported("MCTF", 2.6, 0.801),
        ),
    )
