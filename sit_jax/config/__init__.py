"""The configuration of a run: frozen dataclasses, and the `ml_collections` configs that users write."""

from sit_jax.config.schema import CheckpointConfig as CheckpointConfig
from sit_jax.config.schema import Config as Config
from sit_jax.config.schema import JsonObject as JsonObject
from sit_jax.config.schema import LogConfig as LogConfig
from sit_jax.config.schema import LossConfig as LossConfig
from sit_jax.config.schema import MeshConfig as MeshConfig
from sit_jax.config.schema import ModelConfig as ModelConfig
from sit_jax.config.schema import OptimConfig as OptimConfig
from sit_jax.config.schema import TeacherConfig as TeacherConfig
from sit_jax.config.sweep import Reported as Reported
from sit_jax.config.sweep import Sweep as Sweep
from sit_jax.data.config import AugmentConfig as AugmentConfig
from sit_jax.data.config import DataConfig as DataConfig
from sit_jax.data.config import MixConfig as MixConfig
