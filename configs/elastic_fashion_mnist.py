"""One student for three budgets on Fashion-MNIST: 54%, 39% and 32% of the teacher's cost.

The recipe is that of configs/compare_fashion_mnist.py, with slimming modules. Three epochs are as many steps as one
epoch for each of three students. Hardware: one GPU, or two CPU cores.

    sit data prepare --name fashion_mnist --manual_dir /usr/share/datasets/fashion-mnist
    sit train --config configs/elastic_fashion_mnist.py --workdir runs/elastic_fashion_mnist
    sit tune runs/elastic_fashion_mnist --latency_ms 5
"""

from ml_collections import ConfigDict

from sit_jax.config.files import get_config as named_config

# Keep ratios 0.65, 0.45 and 0.3.
SCHEDULES = ((49, 31, 20, 13), (49, 22, 9, 4), (49, 14, 4, 1))


def get_config() -> ConfigDict:
    config = named_config("compare_fashion_mnist")
    config.model.kept_tokens_choices = SCHEDULES
    config.epochs *= len(SCHEDULES)
    return config
