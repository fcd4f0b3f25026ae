"""Fashion-MNIST: a ViT of 49 tokens is trained, then slimmed to half of its cost.

The teacher's 12 epochs reach 92.1% of the 10,000 test images, in 45 minutes on two busy CPU cores. Hardware: one GPU,
or two CPU cores.

    sit data prepare --name fashion_mnist --manual_dir /usr/share/datasets/fashion-mnist
    sit train --config configs/fashion_mnist.py --workdir runs/fashion_mnist
"""

from ml_collections import ConfigDict

from sit_jax.config import AugmentConfig, CheckpointConfig, DataConfig, LossConfig, OptimConfig
from sit_jax.config.config_dict import defaults, model_section
from sit_jax.models.architecture import Architecture

# The images are enlarged to 112 pixels, for the convolutional stem and 7 x 7 tokens.
TEACHER = Architecture(
    image_size=112, in_channels=1, num_classes=10, stem="conv4", dim=96, depth=8, num_heads=3, mlp_ratio=3.0
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = defaults(DataConfig, name="fashion_mnist", mean=(0.286,) * 3, std=(0.353,) * 3)
    config.augment = defaults(AugmentConfig, flip=0.5)

    # The teacher, trained first.
    config.teacher = ConfigDict()
    config.teacher.model = model_section(TEACHER)
    config.teacher.epochs = 12
    config.teacher.batch_size = 128
    config.teacher.label_smoothing = 0.1
    config.teacher.optim = defaults(OptimConfig, lr=1e-3, warmup_epochs=2.0, clip_norm=1.0)

    # The student: the same model with three slimming modules, started from the teacher's weights.
    config.model = model_section(TEACHER)
    config.model.stage_blocks = (1, 1, 3, 3)
    config.model.keep_ratio = 0.6
    config.init = "teacher"
    config.epochs = 5
    config.batch_size = 128
    config.eval_batch_size = 250
    config.eval_every_epochs = 1
    config.checkpoint = defaults(CheckpointConfig)
    config.optim = defaults(OptimConfig, lr=5e-4, warmup_epochs=0.5, clip_norm=1.0)
    config.loss = defaults(LossConfig, label_smoothing=0.1)
    # See configs/digits.py.
    config.loss.token = 0.1
    config.loss.logits = 2.0
    return config
