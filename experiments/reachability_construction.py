"""The loops that the hand-built transformer needs: all pairs of many random graphs against breadth-first search."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments.random_digraphs import UNREACHED, distances, draw_digraph
from experiments.reachability_weights import SHARPNESS, initial_state, reachability_weights, reached_after
from looplm_jax.data.tasks._base import generator

_AT_ONCE = 50  # graphs evaluated together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A division of the edges between weights and context, and an error of the published construction to keep."""

    name: str
    knowledge: float  # fraction of the edges that the weights hold
    sharpness: float = SHARPNESS  # 0: K^T Q = 0, as published
    self_loops: bool = True  # in the context


VARIANTS = (
    Variant(name="half the edges in the weights", knowledge=0.5),
    Variant(name="all in the weights", knowledge=1.0),
    Variant(name="all in the context", knowledge=0.0),
    Variant(name="half, scores as printed", knowledge=0.5, sharpness=0.0),
    Variant(name="half, without self-loops", knowledge=0.5, self_loops=False),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Construction:
    """The random graphs to evaluate."""

    graphs: int
    most_nodes: int
    seed: int = 0


def loops_needed(diameter: int) -> int:
    """Returns `ceil(log2 D) + 1` loops, as in the theorem."""
    # bit_length of D - 1 is ceil(log2 D).
    return (diameter - 1).bit_length() + 1


def try_construction(construction: Construction) -> dict[str, Any]:
    """Compares all pairs of different nodes of each graph with breadth-first search.

    Returns:
      diameters: number of graphs by D, the longest shortest path; exact: by variant and D, the number of graphs whose
        pairs
      are all correct after 0, 1, … loops; nodes: number of graphs by their number of nodes.
    """
    graphs = [
        draw_digraph(construction.seed, index, most_nodes=construction.most_nodes)
        for index in range(construction.graphs)
    ]

    lengths = [distances(edges) for edges in graphs]
    diameters = [int(found.max()) for found in lengths]
    truth = _padded([found != UNREACHED for found in lengths], construction.most_nodes)

    return {
        "nodes": _sums([len(edges) for edges in graphs], np.ones(len(graphs))),
        "diameters": _sums(diameters, np.ones(len(graphs))),
        "exact": {variant.name: _sums(diameters, _exact(construction, variant, graphs, truth)) for variant in VARIANTS},
    }


def _exact(
    construction: Construction, variant: Variant, graphs: Sequence[Bool[np.ndarray, "_ _"]], truth: Bool[Array, "G n n"]
) -> Bool[np.ndarray, "G loops+1"]:
    """Returns, for each graph and number of loops, whether a variant is exact."""
    known = [
        edges & (generator("knowledge", construction.seed, index).random(edges.shape) < variant.knowledge)
        for index, edges in enumerate(graphs)
    ]

    knowledge = _padded(known, construction.most_nodes)
    # Every edge is in exactly one of the two.
    context = _padded(graphs, construction.most_nodes) & ~knowledge
    context |= variant.self_loops & jnp.eye(construction.most_nodes, dtype=bool)

    exact = _found_exactly(
        knowledge,
        context,
        truth,
        jnp.float32(variant.sharpness),
        loops=loops_needed(construction.most_nodes - 1),
    )
    return np.asarray(exact)


@functools.partial(jax.jit, static_argnames="loops")
def _found_exactly(
    knowledge: Bool[Array, "G n n"],
    context: Bool[Array, "G n n"],
    truth: Bool[Array, "G n n"],
    sharpness: Float[Array, ""],
    *,
    loops: int,
) -> Bool[Array, "G {loops}+1"]:
    """Returns, for each graph and number of loops, whether all pairs of different nodes are correct."""

    def one(knowledge: Array, context: Array, truth: Array) -> Array:
        found = reached_after(reachability_weights(knowledge, sharpness), initial_state(context), loops=loops)
        is_node = jnp.diagonal(truth)  # all nodes reach themselves; padding does not
        asked = is_node[:, None] & is_node & ~jnp.eye(len(truth), dtype=bool)
        return jnp.all((found == truth) | ~asked, axis=(1, 2))

    return jax.lax.map(lambda graph: one(*graph), (knowledge, context, truth), batch_size=_AT_ONCE)


def _padded(relations: Sequence[Bool[np.ndarray, "_ _"]], nodes: int) -> Bool[Array, "G {nodes} {nodes}"]:
    """Returns the relations as one array, padded with nodes without edges."""
    # One size for all graphs, so that one program serves them.
    padded = [np.pad(relation, (0, nodes - len(relation))) for relation in relations]
    return jnp.array(np.stack(padded))


def _sums(keys: Sequence[int], values: np.ndarray) -> dict[str, Any]:
    """Returns the sum of the values of each key, keys in rising order, as JSON values."""
    sums: dict[int, Any] = collections.defaultdict(int)
    for key, value in zip(keys, values, strict=True):
        sums[key] = sums[key] + value.astype(int)
    return {str(key): sums[key].tolist() for key in sorted(sums)}
