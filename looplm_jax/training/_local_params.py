"""The parameters on the devices of one process, where an engine generates without the other processes."""

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from looplm_jax.config import MeshConfig, ModelConfig
from looplm_jax.models._looplm import Params, boxed_shapes
from looplm_jax.sharding import abstract_arrays, make_mesh


def local_mesh(mesh: Mesh) -> Mesh:
    """Returns a mesh of this process's devices, or `mesh` itself if it has no others.

    Its axes `fsdp` and `tensor` divide those of `mesh`, so whatever `mesh` shards evenly is evenly sharded.
    """
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if len(own) == mesh.size:
        return mesh
    tensor = math.gcd(mesh.shape["tensor"], len(own))
    fsdp = math.gcd(mesh.shape["fsdp"], len(own) // tensor)
    return make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor), own)


def local_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Returns parameters of `mesh` in the shardings of `local_mesh(mesh)`.

    All processes must call this at the same point, because their shards are all-gathered, one array at a time.
    """
    own = local_mesh(mesh)
    if own is mesh:
        return params
    gather = _gather(mesh)

    def copied(leaf: Array, like: jax.ShapeDtypeStruct) -> Array:
        whole = leaf if leaf.is_fully_replicated else gather(leaf)
        return jax.device_put(whole.addressable_data(0), like.sharding)

    return jax.tree.map(copied, params, abstract_arrays(boxed_shapes(config), own))


@functools.lru_cache(maxsize=8)
def _gather(mesh: Mesh) -> Callable[[Array], Array]:
    """Returns the program that all-gathers an array, from a cache, so that each shape is compiled once."""
    return jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec()))
