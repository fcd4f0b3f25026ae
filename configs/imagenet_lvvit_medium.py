"""LV-ViT-Medium, the teacher of SiT-Medium, on ImageNet: fine-tuning, or training from scratch.

Reported: 84.0% top-1, trained from scratch with token labelling. Reproduced here: not yet; the fine-tuning recipe is
this project's own. Meant for 16 TPU v5e chips or 8 GPUs of 40 GB; not measured. Fine-tuning starts from a run that
`init` names; scratch needs none. Dense labels come from `sit data label`.

    sit train --config configs/imagenet_lvvit_medium.py --workdir runs/lvvit_medium \\
        --config.init=runs/lvvit_medium_pretrained
    sit train --config configs/imagenet_lvvit_medium.py:scratch --workdir runs/lvvit_medium
    sit train --config configs/imagenet_lvvit_medium.py:token_labelling --workdir runs/lvvit_medium
"""

from ml_collections import ConfigDict

from sit_jax.config.recipe import teacher, token_labelling


def get_config(mode: str = "finetune") -> ConfigDict:
    if mode == "token_labelling":
        return token_labelling(teacher("lvvit_medium", drop_path=0.1, mode="scratch"), "label_maps/imagenet2012")
    return teacher("lvvit_medium", drop_path=0.1, mode=mode)
