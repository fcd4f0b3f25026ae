"""The device mesh and the sharding of arrays, by one rule over names and shapes.

- `data` splits the batch; weights are replicated.
- `fsdp` splits the batch, and also every large array of the state and of the teachers.
- `tensor` splits attention heads, hidden units of the MLPs, and those of the reverse modules' token MLPs.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PyTree

from sit_jax.config import Config, MeshConfig
from sit_jax.errors import require
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import path_names

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Smaller arrays are replicated: gathering them costs more than the memory that sharding saves.
_SMALLEST_SPLIT = 4096
# Axis along which `tensor` splits a layer: its outputs (the heads of qkv, hidden units), or the matching inputs.
_TENSOR_AXIS = {"qkv": -1, "fc1": -1, "proj": 0, "fc2": 0}
# Both layers of the slimming modules are small and have few scores: `tensor` does not split them.
_NOT_SPLIT = "slimming_"


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of the given or else all devices, which are all along `data` by default."""
    chosen = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config or MeshConfig(), len(chosen))
    # Auto axes: with Explicit ones, the default of jax.make_mesh, concatenating a class token is an error.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=chosen)  # Mesh neighbours are neighbours in the torus.


def mesh_shape(config: MeshConfig, count: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes, with -1 resolved; raises a ConfigError if they do not fit `count` devices."""
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    data, fsdp, tensor = (count // fixed if size == -1 else size for size in sizes)
    text = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
    problem = f"{text} is {fixed} devices, but there are {count}; set one size to -1 for the rest"
    require(data * fsdp * tensor == count, "mesh", f"{problem}, and the others to divisors of {count}")
    return data, fsdp, tensor


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates arrays on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits examples over the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """Returns the sharding of every array of a training state, of optimizer moments, or of a model's variables."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(mesh, path_names(path), leaf.shape)), state
    )


def place_abstract(mesh: Mesh, tree: PyTree) -> PyTree:
    """Returns shapes and types with the shardings of `state_shardings`, for restoring or compiling."""
    shardings = state_shardings(mesh, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def partition_spec(mesh: Mesh, names: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """Returns the partition spec of an array: `tensor` by the layer's name, `fsdp` on the longest divisible axis.

    `names` is the path of the array, such as `('params', 'blocks_0', 'attn', 'qkv', 'kernel')`.
    """
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    layer, leaf = ("", *names)[-2:]
    place = _TENSOR_AXIS.get(layer)
    if any(name.startswith(_NOT_SPLIT) for name in names) or (place == 0 and leaf != "kernel"):
        place = None
    if tensor > 1 and place is not None and shape[place] % tensor == 0:
        axes[place] = "tensor"
    if fsdp > 1 and math.prod(shape) >= _SMALLEST_SPLIT:
        free = [d for d, axis in enumerate(axes) if axis is None and shape[d] % fsdp == 0]
        if free:
            axes[max(free, key=lambda d: shape[d])] = "fsdp"
    return PartitionSpec(*axes)


def check_mesh(mesh: Mesh, config: Config) -> None:
    """Raises a ConfigError if batches or heads are not divisible by the mesh axes, before compilation."""
    shards, parts = _batch_shards(mesh), config.optim.accumulate_steps
    micro = f" in {parts} micro-batches" if parts > 1 else ""
    problem = f"{config.batch_size} examples{micro} do not divide over {shards} devices (data x fsdp)"
    require(config.batch_size % (shards * parts) == 0, "batch_size", problem)
    tensor = mesh.shape["tensor"]
    # Each process feeds its own devices, so devices that share examples must belong to one process.
    owners = np.array([device.process_index for device in mesh.devices.flat]).reshape(-1, tensor)
    problem = f"groups of {tensor} devices would lie across hosts on this mesh; choose a smaller one"
    require((owners == owners[:, :1]).all(), "mesh.tensor", problem)
    models = [("model", config.model), *((f"{n}.model", t.model) for n, t in config.teachers.items())]
    for name, model in models:
        arch = model.architecture
        if isinstance(arch, Architecture):
            problem = f"{arch.num_heads} heads do not divide over mesh.tensor {tensor}"
            require(arch.num_heads % tensor == 0, f"{name}.num_heads", problem)


def eval_batch_size(mesh: Mesh, batch_size: int) -> int:
    """Returns the batch size of an evaluation, rounded up to a multiple of the devices; padding is not counted."""
    return -(-batch_size // _batch_shards(mesh)) * _batch_shards(mesh)


def _batch_shards(mesh: Mesh) -> int:
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def place(mesh: Mesh, tree: PyTree) -> PyTree:
    """Copies host values, which are the same in every process, to the devices, with the rule of `state_shardings`."""

    def put(value: ArrayLike, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, state_shardings(mesh, tree))


def put_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Transfers this process's part of a batch to its devices, as part of one global array."""
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        # The global shape is given, not inferred, so that a part that does not match the local devices is an error.
        whole = (x.shape[0] * jax.process_count(), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, whole)

    return jax.tree.map(put, batch)
