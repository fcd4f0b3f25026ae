"""LV-ViT-XSmall, the teacher of SiT-XSmall, on ImageNet: fine-tuning, or training from scratch.

Reported: 83.1% top-1, trained from scratch with token labelling. Reproduced here: not yet; the fine-tuning recipe is
this project's own. Meant for 16 TPU v5e chips or 8 GPUs of 40 GB; not measured. Fine-tuning starts from a run that
`init` names; scratch needs none. Dense labels come from `sit data label`.

    sit train --config configs/imagenet_lvvit_xsmall.py --workdir runs/lvvit_xsmall \\
        --config.init=runs/lvvit_xsmall_pretrained
    sit train --config configs/imagenet_lvvit_xsmall.py:scratch --workdir runs/lvvit_xsmall
    sit train --config configs/imagenet_lvvit_xsmall.py:token_labelling --workdir runs/lvvit_xsmall
"""

from ml_collections import ConfigDict

from sit_jax.config.recipe import teacher, token_labelling


def get_config(mode: str = "finetune") -> ConfigDict:
    if mode == "token_labelling":
        return token_labelling(teacher("lvvit_xsmall", drop_path=0.1, mode="scratch"), "label_maps/imagenet2012")
    return teacher("lvvit_xsmall", drop_path=0.1, mode=mode)
