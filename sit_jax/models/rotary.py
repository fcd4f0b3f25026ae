"""Rotary positions of queries and keys on the grid of patches, as in DINOv3, and the positions of merged tokens."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Cosine and sine, (batch or 1, tokens, head_dim), float32.
Rotation = tuple[Array, Array]


def rotary_positions(
    coordinates: Float[Array, "batch patches 2"], prefix: int, head_dim: int, theta: float
) -> Rotation:
    """Returns the rotation of queries and keys by two-dimensional rotary positions, as in DINOv3.

    Args:
        coordinates: Row and column of each patch token, from -1 to 1 over the image.
        prefix: Number of tokens before the patches, which are not rotated.
        head_dim: Width of a head. A quarter of it has the frequencies of the rows, a quarter those of the columns.
        theta: Base of the periods.
    """
    frequencies = theta ** -jnp.arange(0, 1, 4 / head_dim)
    angles = 2 * jnp.pi * coordinates[..., None] * frequencies[None, None, None]
    angles = jnp.tile(angles.reshape(*coordinates.shape[:2], head_dim // 2), (1, 1, 2))
    angles = jnp.pad(angles, ((0, 0), (prefix, 0), (0, 0)))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch heads tokens size"], rotation: Rotation) -> Float[Array, "batch heads tokens size"]:
    """Applies a rotation to queries or keys: the first half of the channels is paired with the second."""
    cosine, sine = (part[:, None] for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return (x * cosine + jnp.concatenate([-second, first], axis=-1) * sine).astype(x.dtype)


def grid_coordinates(grid: tuple[int, int]) -> Float[Array, "1 patches 2"]:
    """Returns row and column of the centre of each patch, from -1 to 1 over the image, in the order of the tokens."""
    rows, columns = (2 * (np.arange(count) + 0.5) / count - 1 for count in grid)
    return jnp.asarray(np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(1, -1, 2), jnp.float32)


def merge_coordinates(
    assignment: Float[Array, "batch tokens kept"], coordinates: Float[Array, "_ tokens 2"]
) -> Float[Array, "batch kept 2"]:
    """Returns the coordinates of merged tokens: a convex combination of those of the tokens that each consists of."""
    weights = assignment / jnp.maximum(assignment.sum(axis=1, keepdims=True), 1e-30)
    return jnp.einsum("bnk,bnc->bkc", weights, jnp.broadcast_to(coordinates, (*assignment.shape[:2], 2)))
