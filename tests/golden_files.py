"""Reads the golden files: numbers made by the PyTorch original on small models (see golden/README.md)."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from sit_jax.config import Config, LossConfig, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.io.convert.sit_names import name_table
from sit_jax.models.architecture import Architecture, Stem
from sit_jax.models.trees import Variables

FOLDER = pathlib.Path(__file__).parent / "golden"
TRAINED = ("lvvit_4c", "lvvit_6c", "deit_naive")
STEMS: dict[str, Stem] = {"4c": "conv4", "6c": "conv6", "naive": "patch"}


class Golden(NamedTuple):
    """Arrays and settings of a file as stored, the student's architecture, and the weights in our layout.

    The student's are those at the start, with its reverse modules under `rtsm`.
    """

    data: dict[str, np.ndarray]
    meta: dict[str, Any]
    arch: Architecture
    teacher: Variables
    student: Variables


@functools.cache
def load(name: str) -> Golden:
    """Reads a golden file by its name without suffix."""
    with np.load(FOLDER / f"{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    meta = json.loads(bytes(data["meta_json"]))
    arch = architecture(meta["model"])
    teacher, own = part(data, "teacher/"), part(data, "student_own/")
    student = from_original({**teacher, **own}, arch)
    return Golden(data, meta, arch, from_original(teacher, arch.without_slimming()), student)


def from_original(weights: Mapping[str, np.ndarray], arch: Architecture) -> Variables:
    """The original's weights in our layout; reverse modules where there are any."""
    entries = name_table(arch, rtsm=any(key.startswith("rtsm.") for key in weights))
    return unflatten_dict({entry.path: entry.to_flax(np.asarray(weights[entry.key])) for entry in entries})


def part(data: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def architecture(model: dict[str, Any]) -> Architecture:
    """Our architecture for the original's model arguments."""
    return Architecture(
        image_size=model["img_size"],
        in_channels=model["in_chans"],
        num_classes=model["num_classes"],
        stem=STEMS[model["p_emb"]],
        patch_size=model["patch_size"],
        dim=model["embed_dim"],
        depth=model["depth"],
        num_heads=model["num_heads"],
        mlp_ratio=model["mlp_ratio"],
        qkv_bias=model["qkv_bias"],
        residual_scale=model["skip_lam"],
        norm_eps=1e-5,
        distillation_token=model.get("conv_distillation", False),
        aux_head=True,
        stage_blocks=tuple(model["stage_blocks"]),
        keep_ratio=model["keeping_ratio"],
    )


def config(golden: Golden) -> Config:
    """The golden run's configuration: one step is one epoch, and everything is decayed that the original decays."""
    optim, weights = golden.meta["optimizer"], golden.meta["distillation"]
    return Config(
        model=ModelConfig(architecture=golden.arch),
        teacher=TeacherConfig(model=ModelConfig(architecture=golden.arch.without_slimming())),
        epochs=optim["epochs"],
        batch_size=golden.data["steps/images_nchw"].shape[1],
        loss=LossConfig(token=weights["lambda_token"], logits=weights["lambda_logits"], temperature=weights["tau"]),
        optim=OptimConfig(
            lr=optim["lr"],
            min_lr=optim["min_lr"],
            rtsm_lr_scale=optim["rtsm_lr_scale"],
            schedule_per="epoch",
            weight_decay=optim["weight_decay"],
            eps=optim["eps"],
            decay_like_original=True,
        ),
    )


def nhwc(images: np.ndarray) -> jax.Array:
    """Images with the channels last."""
    return jnp.asarray(images.transpose(0, 2, 3, 1))
