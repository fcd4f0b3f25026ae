"""The mesh, and where on it everything lies."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sit_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices along `data`.

    Args:
        devices: Devices to use; all of them where None.
    """
    chosen = jax.devices() if devices is None else devices
    # Auto axes: under Explicit ones, which jax.make_mesh takes by default, concatenating a class token is an error.
    return Mesh(np.array(chosen).reshape(len(chosen), 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over the devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of every array of a training state or of a model's variables: one copy per device."""
    return jax.tree.map(lambda _: replicated(mesh), state)


def check_batch(mesh: Mesh, name: str, batch_size: int, parts: int = 1) -> None:
    """Raises a ConfigError where a batch does not divide over the mesh.

    Args:
        mesh: The mesh.
        name: The config key that holds the batch size.
        batch_size: Examples per step.
        parts: Micro-batches that each batch is worked off in.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (shards * parts):
        micro = f" in {parts} micro-batches" if parts > 1 else ""
        raise ConfigError(f"{name}: {batch_size} examples{micro} do not divide over {shards} devices")


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Moves this process's share of a batch to its devices as part of one global array."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
