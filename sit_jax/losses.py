"""The terms of feature recalibration distillation (section 3.3 of the paper) and others, as pure float32 functions.

Every term is a mean over the batch, so that a batch split over devices or into micro-batches gives the same value.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def soft_target_cross_entropy(
    logits: Float[Array, "batch *patches classes"], labels: Float[Array, "batch *patches classes"]
) -> Float[Array, ""]:
    """Cross entropy with soft labels (smoothed, mixed, or one-hot).

    With dense labels, it is averaged over the patches, as in token labelling (LV-ViT, section 3.2).
    """
    return -(labels * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1).mean()


def token_distillation(
    recovered: Sequence[Float[Array, "batch patches dim"]], targets: Sequence[Float[Array, "batch patches dim"]]
) -> Float[Array, ""]:
    """Mean over all blocks of the mean squared error between the student's recovered tokens and the teacher's.

    Raises:
        ValueError: Different numbers of blocks.
    """
    return jnp.stack([mean_squared_error(*pair) for pair in zip(recovered, targets, strict=True)]).mean()


def mean_squared_error(
    student: Float[Array, "batch *patches dim"], teacher: Float[Array, "batch *patches dim"]
) -> Float[Array, ""]:
    """Mean squared error of one block's recovered tokens, or of pooled features."""
    return jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)).mean()


def cosine_error(student: Float[Array, "batch dim"], teacher: Float[Array, "batch dim"]) -> Float[Array, ""]:
    """One minus the cosine similarity of pooled features, averaged over the batch."""
    mine, theirs = (x.astype(jnp.float32) for x in (student, teacher))
    # The smallest square keeps the gradient of a vector of zeros finite.
    scales = [jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1), 1e-24)) for x in (mine, theirs)]
    return 1.0 - ((mine * theirs).sum(axis=-1) * scales[0] * scales[1]).mean()


def logits_distillation(
    student: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"], temperature: float = 1.0
) -> Float[Array, ""]:
    """`tau^2 KL(teacher || student)` at temperature tau, summed over classes and averaged over the batch."""
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_teacher = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    divergence = (jnp.exp(log_teacher) * (log_teacher - log_student)).sum(axis=-1)
    return temperature**2 * divergence.mean()


def hard_distillation(
    logits: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]
) -> Float[Array, ""]:
    """Cross entropy of the distillation head with the CNN teacher's most likely class (DeiT's hard labels)."""
    return label_cross_entropy(logits, teacher.argmax(axis=-1)).mean()


def label_cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """Cross entropy of each example with its class index."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
