"""The forward pass for deployment: includes the weights and, optionally, the normalization."""

from collections.abc import Callable

from jaxtyping import Array, Float, Shaped

from sit_jax.data.preprocess import normalize
from sit_jax.io.inference import inference_model
from sit_jax.io.model import Model

Forward = Callable[[Shaped[Array, "batch height width channels"]], Float[Array, "batch classes"]]


def make_forward(model: Model, raw_input: bool) -> Forward:
    """Returns the function from images to logits, including its weights, for any platform.

    Args:
        model: The model.
        raw_input: Whether it takes uint8 pixels and normalizes them as `metadata` says; otherwise it takes normalized
            float32 images.
    """
    prepared = inference_model(model.arch, model.variables, attention="plain")

    def forward(images: Shaped[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        return prepared.apply(prepared.weights, normalize(images, model.data) if raw_input else images)

    return forward
