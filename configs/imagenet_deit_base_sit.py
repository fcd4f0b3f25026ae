"""DeiT-B on ImageNet, slimmed after blocks 3, 6 and 9; the keep ratio is given after a colon.

Keep ratios 0.9/0.7/0.5/0.25 cost 15.26/11.24/8.36/6.00 GMAC of the teacher's 17.56. Reported accuracy: none;
reproduced here: not yet. Intended hardware: 16 TPU v5e chips or 8 GPUs of 40 GB; not measured. The teacher is a run of
`deit_base` in `teacher.run`.

    sit train --config configs/imagenet_deit_base_sit.py:0.7 --workdir runs/deit_base_sit \\
        --config.teacher.run=runs/deit_base
"""

from ml_collections import ConfigDict

from sit_jax.config.recipe import distillation


def get_config(keep_ratio: str = "0.5") -> ConfigDict:
    student = f"deit_base_sit_{keep_ratio}"
    return distillation(student, "deit_base", teacher_run="runs/deit_base", drop_path=0.1)
