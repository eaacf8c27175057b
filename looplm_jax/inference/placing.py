"""Where the arrays of generation lie on a mesh: keys and values are spread over their heads, all else is whole."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from looplm_jax.sharding import use_mesh

T = TypeVar("T")


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """In it, the model's axes mean those of the mesh; without a mesh, nothing."""
    return contextlib.nullcontext() if mesh is None else use_mesh(mesh)


def placed(make: Callable[[], T], mesh: Mesh | None) -> T:
    """What `make()` returns, made where it belongs. Arrays of six axes are keys and values, `[L, P, N, C, K, Dh]`."""
    return make() if mesh is None else jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def put(tree: T, mesh: Mesh | None) -> T:
    """Arrays that are there already, where they belong."""
    return tree if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def settled(tree: T) -> T:
    """What a program returns, where it belongs: otherwise XLA chooses, and the next program is compiled once more."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, _spec(leaf)), tree)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns where each array of a tree, which may be abstract, is on a mesh."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf)), tree)


def _spec(leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    return PartitionSpec(None, None, None, None, "tensor") if leaf.ndim == 6 else PartitionSpec()
