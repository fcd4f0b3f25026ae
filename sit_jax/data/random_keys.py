"""Random keys as a function of seed, stream and step."""

import jax

# One stream per use of randomness. Keys are a function of (seed, stream, step), so checkpoints store none.
STREAMS = {"init": 0, "drop_path": 1, "erase": 2, "mix": 3}


def stream_key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """Returns the random key of a stream at a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS[stream]), step)
