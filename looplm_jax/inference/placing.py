"""Shardings of the arrays of generation: keys and values are sharded over their heads, all else is replicated."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from looplm_jax.sharding import use_mesh

T = TypeVar("T")


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the model's logical axes map to the mesh; without a mesh, it does nothing."""
    return contextlib.nullcontext() if mesh is None else use_mesh(mesh)


def placed(make: Callable[[], T], mesh: Mesh | None) -> T:
    """Returns `make()`, created with its shardings. Arrays of six axes are keys and values, `[L, P, N, C, K, Dh]`."""
    return make() if mesh is None else jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def put(tree: T, mesh: Mesh | None) -> T:
    """Returns existing arrays, moved to their shardings."""
    return tree if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def settled(tree: T) -> T:
    """Constrains the results of a program to their shardings.

    Otherwise XLA chooses, and the next program is recompiled.
    """
    # Without a mesh there is nothing to choose.
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, _spec(leaf)), tree)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the sharding of each array of a tree, which may be abstract."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf)), tree)


def _spec(leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    """Returns the partition of an array: only the axis of heads, the fifth of six, is sharded."""
    return PartitionSpec(None, None, None, None, "tensor") if leaf.ndim == 6 else PartitionSpec()
