"""The hand-built looped transformer that finds all paths of a graph (Ouro paper, B.5, Theorem 2), and its test.

Some edges of the graph are knowledge, stored in the weights; the others are in the context. Column j of the state is
`[v_j ; a_j]`: the identity of the node, and the nodes that are known to be reachable from it. One head and one
feed-forward layer,

    H' = N(H + V H softmax((K H)^T Q H)),   H'' = N(H' + W2 relu(W1 H')),   N(x) = 1{x > 0}

are applied repeatedly. The query of j is a_j and the key of i is v_i, so that j attends to the nodes it reaches, and
takes over the nodes that they reach: the square of the relation. The feed-forward layer adds the edges that are
knowledge.

As published, `K^T Q = 0`: every node attends to all. Here `Q = [[0, I], [0, 0]]`, and every node reaches itself in the
context, because a node that reaches none would also attend to all. Scores are scaled by `SHARPNESS`, because softmax is
never exactly zero in theory.

After k loops a pair is found if and only if it is joined by a walk that splits into at most 2^(k-1) pieces, each of
them an edge, or two consecutive edges of the context: knowledge enters at the end of loop 1, and each further loop
doubles the length. So if the longest shortest path is D, `ceil(log2 D) + 1` loops find all pairs; one loop fewer also
does if the context holds all edges, and never does if the weights hold all.

`try_construction` compares it on many random graphs with breadth-first search, after every number of loops.
"""

import collections
import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.data.tasks._base import generator

# The weights


SHARPNESS = 128.0  # e^-128 is zero in float32


@flax.struct.dataclass
class ReachabilityWeights:
    """Weights of the layer for graphs of n nodes; d = 2n."""

    query: Float[Array, "d d"]
    key: Float[Array, "d d"]
    value: Float[Array, "d d"]
    inner: Float[Array, "n d"]
    outer: Float[Array, "d n"]


def reachability_weights(
    knowledge: Bool[Array, "n n"], sharpness: float | Float[Array, ""] = SHARPNESS
) -> ReachabilityWeights:
    """Returns weights that hold some edges, from rows to columns. With `sharpness` 0, K^T Q = 0 as published."""
    nodes = len(knowledge)
    eye, none = jnp.eye(nodes, dtype=jnp.float32), jnp.zeros((nodes, nodes), jnp.float32)
    return ReachabilityWeights(
        query=jnp.block([[none, eye], [none, none]]),
        key=jnp.block([[sharpness * eye, none], [none, none]]),
        value=jnp.block([[none, none], [none, eye]]),
        inner=jnp.block([eye, none]),
        outer=jnp.block([[none], [knowledge.T.astype(jnp.float32)]]),
    )


def initial_state(context: Bool[Array, "n n"]) -> Float[Array, "d n"]:
    """Returns the columns `[v_j ; a_j]` for the edges of the context, from rows to columns."""
    # [n, n] on [n, n]: v_j is one-hot.
    return jnp.concatenate([jnp.eye(len(context), dtype=jnp.float32), context.T.astype(jnp.float32)])


def reached_after(
    weights: ReachabilityWeights, state: Float[Array, "d n"], *, loops: int
) -> Bool[Array, "{loops}+1 n n"]:
    """Returns whether a node (row) is known to reach another (column), after 0..`loops` loops."""

    def loop(state: Array, _: None) -> tuple[Array, Array]:
        state = _layer(weights, state)
        return state, _reached(state)

    _, found = jax.lax.scan(loop, state, length=loops)
    # The entry of 0 loops is the context itself.
    return jnp.concatenate([_reached(state)[None], found])


def _layer(weights: ReachabilityWeights, state: Float[Array, "d n"]) -> Float[Array, "d n"]:
    """Applies one loop."""
    # [n, n]: the score of every key (row) for every query (column).
    scores = (weights.key @ state).T @ (weights.query @ state)
    attended = weights.value @ state @ jax.nn.softmax(scores, axis=0)
    state = _threshold(state + attended)
    return _threshold(state + weights.outer @ jax.nn.relu(weights.inner @ state))


def _threshold(state: Float[Array, "d n"]) -> Float[Array, "d n"]:
    """Returns N(x) = 1{x > 0}."""
    return (state > 0).astype(state.dtype)


def _reached(state: Float[Array, "d n"]) -> Bool[Array, "n n"]:
    """Returns the relation that the lower half of the state holds."""
    return state[state.shape[1] :].T > 0


# Random graphs


UNREACHED = -1


class Family(enum.Enum):
    """The distribution from which a graph is drawn."""

    SPARSE = "sparse"  # every edge with the same probability, 0.5 to 4 edges per node
    TREE = "tree"  # every node below one of the last few nodes
    PATH = "path"  # a path through all nodes, and up to three more edges


def draw_digraph(seed: int, index: int, *, most_nodes: int) -> Bool[np.ndarray, "n n"]:
    """Returns graph `index` of a seed, of any family, with 2..`most_nodes` nodes, at least one edge and no self-loops.

    Returns: whether an edge leads from a node (row) to another (column).
    """
    random = generator("digraph", seed, index)
    # All families are equally likely.
    family = list(Family)[int(random.integers(len(Family)))]
    nodes = int(random.integers(2, most_nodes + 1))

    while not (edges := _draw(random, family, nodes)).any():
        pass
    # Otherwise the numbers of the nodes would reveal the order in which a tree or path was built.
    names = random.permutation(nodes)
    return edges[np.ix_(names, names)]


def distances(edges: Bool[np.ndarray, "n n"]) -> Int[np.ndarray, "n n"]:
    """Returns the number of edges on the shortest path between all nodes, `UNREACHED` if there is none."""
    follows = [np.flatnonzero(row).tolist() for row in edges]
    return np.array([_distances_from(start, follows) for start in range(len(edges))])


def _draw(random: np.random.Generator, family: Family, nodes: int) -> Bool[np.ndarray, "n n"]:
    """Draws the edges of a graph, whose nodes are in the order of construction."""
    match family:
        case Family.SPARSE:
            edges = random.random((nodes, nodes)) < random.uniform(0.5, 4) / nodes
        case Family.TREE:
            edges, window = np.zeros((nodes, nodes), bool), int(random.integers(1, nodes + 1))
            for node in range(1, nodes):
                # A small window makes deep trees, a large one shallow trees.
                edges[random.integers(max(0, node - window), node), node] = True
        case Family.PATH:
            edges = np.eye(nodes, k=1, dtype=bool)
            chords = int(random.integers(4))
            edges[random.integers(nodes, size=chords), random.integers(nodes, size=chords)] = True

    np.fill_diagonal(edges, val=False)
    return edges


def _distances_from(start: int, follows: list[list[int]]) -> list[int]:
    """Returns the distances from one node by breadth-first search."""
    found = [UNREACHED] * len(follows)
    found[start], front = 0, [start]
    for node in front:  # grows during the iteration
        for following in follows[node]:
            if found[following] == UNREACHED:
                found[following] = found[node] + 1
                front.append(following)
    return found


# The test


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
