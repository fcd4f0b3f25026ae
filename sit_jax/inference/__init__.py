"""Inference at speed: `prepare` turns a model and its weights into a function from images to logits."""

from sit_jax.inference.prepare import Prepared, prepare

__all__ = ["Prepared", "prepare"]
