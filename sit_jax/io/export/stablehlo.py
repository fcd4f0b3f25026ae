"""StableHLO artifacts: one file for CPU, CUDA and TPU that includes the weights, and a description file.

`load` needs JAX but does not import the model code.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from sit_jax.errors import UserError, one_line
from sit_jax.io.atomic_write import atomic_create

PLATFORMS = ("cpu", "cuda", "tpu")
# Key of the artifact's SHA-256 in its description.
CHECKSUM = "sha256"


class Loaded(NamedTuple):
    """A loaded artifact.

    `run` is a function of images (batch, height, width, channels), for any batch size; the description's `input` says
    whether they are `pixels` (uint8) or `images` (normalized float32). It returns the logits, or features by name
    without a head.
    """

    run: Callable[[Any], Any]
    description: dict[str, Any]


def description_path(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of an artifact's description: `model.stablehlo` -> `model.stablehlo.json`."""
    return path.with_name(f"{path.name}.json")


def save(
    path: pathlib.Path, forward: Callable[..., Any], shape: tuple[int, int, int], description: dict[str, Any]
) -> None:
    """Writes a function of images, including the arrays in its closure, for every platform and batch size.

    `shape` is the height, width and channels of an image; `input` of the description determines its type. Raises a
    UserError if the file exists or cannot be written.
    """
    dtype = jnp.uint8 if description["input"] == "pixels" else jnp.float32
    # The description is written first, so that an artifact always has one.
    with atomic_create(path) as part, atomic_create(description_path(path)) as beside:
        (batch,) = export.symbolic_shape("batch")
        with _without_source_files():
            # Wrapped in a new function, since cached traces keep their source files.
            traced = jax.jit(lambda images: forward(images))
            exported = export.export(traced, platforms=PLATFORMS)(jax.ShapeDtypeStruct((batch, *shape), dtype))
        artifact = exported.serialize()
        part.write_bytes(artifact)
        checksum = hashlib.sha256(artifact).hexdigest()
        beside.write_text(json.dumps({**description, CHECKSUM: checksum}, indent=2) + "\n")


def load(path: str | pathlib.Path) -> Loaded:
    """Reads an artifact; raises a UserError if it is missing, damaged or not for this machine's devices."""
    path = pathlib.Path(path)
    try:
        description, artifact = json.loads(description_path(path).read_text()), path.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{description_path(path)}: is not valid JSON: {one_line(error, 200)}") from None
    # XLA's parser aborts the process for some damaged artifacts, so the checksum is verified first.
    checksum = description.pop(CHECKSUM, None) if isinstance(description, dict) else None
    if hashlib.sha256(artifact).hexdigest() != checksum:
        raise UserError(f"{path}: is damaged, or does not match {description_path(path).name}")
    try:
        exported = export.deserialize(bytearray(artifact))
    except Exception as error:  # A later JAX may reject an old artifact with any type of error.
        reason = one_line(error, 200)
        raise UserError(f"{path}: cannot be read by this version of JAX: {reason}") from None
    platform = jax.default_backend().replace("gpu", "cuda")
    if platform not in exported.platforms:
        raise UserError(f"{path}: was exported for {', '.join(exported.platforms)}; this machine has {platform}")
    return Loaded(jax.jit(exported.call), description)


@contextlib.contextmanager
def _without_source_files() -> Iterator[None]:
    """Removes source locations, which JAX records for every operation and which contain local paths."""
    options = {"jax_include_full_tracebacks_in_locations": False, "jax_hlo_source_file_canonicalization_regex": ".*"}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
