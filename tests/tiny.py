"""Configurations small enough to train in a test."""

import dataclasses
from typing import Any

import jax
import numpy as np

from sit_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture

TEACHER = Architecture(
    image_size=32, in_channels=1, num_classes=10, stem="conv4", dim=16, depth=4, num_heads=2, mlp_ratio=2.0
)
STUDENT = dataclasses.replace(TEACHER, stage_blocks=(1, 3), keep_ratio=0.5)
# What compiles fastest: two blocks, and no BatchNorm.
TWO_BLOCKS = dataclasses.replace(TEACHER, stem="patch", depth=2)
SLIMMED = dataclasses.replace(TWO_BLOCKS, stage_blocks=(1, 1), keep_ratio=0.5)
# Token schedules of an elastic student.
CHOICES = ((4, 3), (4, 2), (4, 1))
CNN = RegNetArchitecture(
    image_size=32, in_channels=1, num_classes=10, stem_width=4, widths=(8, 8), depths=(1, 1), group_width=4
)
FRD = LossConfig(token=2.0, logits=2.0, label_smoothing=0.1)


def config(loss: LossConfig = FRD, arch: Architecture = STUDENT, **changes: Any) -> Config:
    """A student's configuration with a teacher that is trained for one epoch."""
    teacher = TeacherConfig(model=ModelConfig(architecture=TEACHER), batch_size=128)
    fields: dict[str, Any] = {
        "model": ModelConfig(architecture=arch),
        "teacher": teacher,
        "epochs": 2,
        "batch_size": 16,
        "loss": loss,
        "optim": OptimConfig(lr=1e-3),
    }
    return Config(**{**fields, **changes})


def folder_config(data: DataConfig, num_classes: int = 8, **changes: Any) -> Config:
    """A model's configuration, without a teacher, for a folder of colour images."""
    model = ModelConfig(architecture=plain(in_channels=3, num_classes=num_classes))
    return config(**{"loss": LossConfig(), "model": model, "teacher": None, "data": data, **changes})


def small(dtype: Any = "float32", student: Any = SLIMMED, teacher: Any = TWO_BLOCKS, **changes: Any) -> Config:
    """The same of two blocks."""
    section = TeacherConfig(model=ModelConfig(architecture=teacher, dtype=dtype), batch_size=128)
    return config(**{"model": ModelConfig(architecture=student, dtype=dtype), "teacher": section, **changes})


def plain(**changes: Any) -> Architecture:
    """The teacher's shape with some fields changed."""
    return dataclasses.replace(TEACHER, **changes)


def batch(size: int, seed: int = 0) -> dict[str, jax.Array]:
    """A batch of noise."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, 32, 32, 1)).astype(np.float32)
    return {"image": jax.numpy.asarray(images), "label": jax.numpy.asarray(rng.integers(0, 10, size), np.int32)}
