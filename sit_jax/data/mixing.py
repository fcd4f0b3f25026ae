"""Labels as the loss takes them, made on the device."""

import jax
from jaxtyping import Array, Float, Int


def soft_labels(
    labels: Int[Array, " batch"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "batch classes"]:
    """Class indices as rows of probabilities, `smoothing` of which is spread evenly over all classes."""
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes
