"""Token reducers on Fashion-MNIST: slim, ToMe, Top-K and EViT, at about a half and a quarter of the cost.

The recipe is that of configs/fashion_mnist.py, on a third of the training images and with fewer epochs: the teacher
reaches 87.8% of the 10,000 test images, the students 85.3% to 87.5% (docs/reproduction.md). All images, and the teacher
of a run of that config: `--config.data.train_split=train --config.teacher.run=runs/fashion_mnist/teacher`. Hardware:
one GPU, or two CPU cores; a seed takes about an hour on them.

    sit data prepare --name fashion_mnist --manual_dir /usr/share/datasets/fashion-mnist
    sit compare --config configs/compare_fashion_mnist.py --workdir runs/compare
"""

from ml_collections import ConfigDict

from sit_jax.config import Sweep
from sit_jax.config.files import get_config as named_config

TRAIN_IMAGES = 20_000
TEACHER_EPOCHS = 10
EPOCHS = 1
# Reducers at the first, second and fifth of eight blocks, so that a quarter of the cost is in reach: the stem and the
# attention of the first block, which works on all tokens, are a fifth.
STAGE_BLOCKS = (1, 1, 3, 3)
# 49% and 26% of the teacher's multiply-accumulates, by `sit_jax.analysis.flops.count_cost`; 54% and 32% with slim,
# which reduces after the block's MLP and not before it.
KEEP_RATIOS = (0.65, 0.3)


def get_config() -> ConfigDict:
    config = named_config("fashion_mnist")
    config.data.train_split = f"train[:{TRAIN_IMAGES}]"
    config.teacher.epochs = TEACHER_EPOCHS
    config.model.stage_blocks = STAGE_BLOCKS
    config.model.keep_ratio = KEEP_RATIOS[0]
    config.epochs = EPOCHS
    config.batch_size = 64
    config.eval_every_epochs = EPOCHS
    config.optim.warmup_epochs = 0.1
    return config


def get_sweep() -> Sweep:
    return Sweep(
        reducers=("slim", "tome", "topk", "evit"),
        keep_ratios=KEEP_RATIOS,
        objectives=("frd", "ce", "untrained"),
        seeds=(0, 1),
        batch_sizes=(1, 64),
    )
