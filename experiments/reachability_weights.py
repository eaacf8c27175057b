"""The hand-built looped transformer that finds all paths of a graph (Ouro paper, B.5, Theorem 2).

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
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
