"""Cross-entropy of every token at every loop, in chunks of the sequence, without an array `[T, B, S, V]`.

Only the logits of one loop and `chunk` positions of each sequence, `[B, chunk, V]`, exist simultaneously, in float32.
On a mesh, every device processes the chunks of its own tokens.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from looplm_jax.sharding import shard_map_over_tokens, target_platform

_STATES = (None, "batch", "sequence", None)  # logical axes [T, B, S, D]
R = TypeVar("R")


@flax.struct.dataclass
class TokenScores:
    """Cross-entropy of each token in nats, and whether its most probable token is the target."""

    loss: Float[Array, "T B S"]
    correct: Bool[Array, "T B S"]


def token_losses(
    hidden: Float[Array, "T B S D"], head: Float[Array, "D V"], targets: Int[Array, "B S"], *, chunk: int = 128
) -> Float[Array, "T B S"]:
    """Returns the cross-entropy of each target at each loop, in nats and float32.

    The backward pass recomputes the logits of each chunk.

    Args:
      hidden: the states that the head reads, for every loop.
      head: the matrix from states to logits. It is cast to the dtype of `hidden`.
      targets: the token that each position predicts.
      chunk: the number of positions of a sequence that are processed together.
    """

    @jax.checkpoint
    def losses_of(
        states: Float[Array, "B C D"], head: Float[Array, "D V"], labels: Int[Array, "B C"]
    ) -> Float[Array, "B C"]:
        return _cross_entropy(_logits(states, head), labels)

    return _over_chunks(losses_of, hidden, head, targets, chunk)


def token_scores(
    hidden: Float[Array, "T B S D"], head: Float[Array, "D V"], targets: Int[Array, "B S"], *, chunk: int = 128
) -> TokenScores:
    """Returns loss and correctness of each token at each loop, for evaluation. Arguments as in `token_losses`."""

    def scores_of(states: Float[Array, "B C D"], head: Float[Array, "D V"], labels: Int[Array, "B C"]) -> TokenScores:
        logits = _logits(states, head)
        return TokenScores(loss=_cross_entropy(logits, labels), correct=jnp.argmax(logits, axis=-1) == labels)

    return _over_chunks(scores_of, hidden, head, targets, chunk)


def token_entropies(
    hidden: Float[Array, "T B S D"], head: Float[Array, "D V"], *, chunk: int = 128
) -> Float[Array, "T B S"]:
    """Returns the entropy of each prediction at each loop, in nats and float32.

    LoopRPT selects tokens by that of the last loop, `hidden[-1:]`. It is a constant, without gradients. Arguments as in
    `token_losses`.
    """

    def entropies_of(
        states: Float[Array, "B C D"], head: Float[Array, "D V"], labels: Int[Array, "B C"]
    ) -> Float[Array, "B C"]:
        del labels  # an entropy is that of a whole prediction
        log_probs = jax.nn.log_softmax(_logits(states, head))
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    no_targets = jnp.zeros(hidden.shape[1:3], jnp.int32)
    return jax.lax.stop_gradient(_over_chunks(entropies_of, hidden, head, no_targets, chunk))


def weighted_token_losses(
    hidden: Float[Array, "T B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "T B S"],
    *,
    chunk: int = 128,
) -> tuple[Float[Array, ""], Float[Array, "T B S"]]:
    """Returns `sum(weights * token_losses)`, and the token losses as a constant.

    The sum is differentiable in `hidden`, `head` and `weights`. Because the weights do not depend on the logits, the
    forward pass computes the gradient of each chunk while its logits exist, and nothing is recomputed.
    """
    total, losses = _weighted(hidden, head, targets, weights, chunk)

    return total, jax.lax.stop_gradient(losses)


# Gradients in the forward pass


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array]:
    """Returns the weighted sum and the token losses; without differentiation no gradients are computed."""
    losses = token_losses(hidden, head, targets, chunk=chunk)
    return jnp.sum(weights * losses), losses


def _weighted_forward(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> tuple[PyTree, PyTree]:
    """Computes losses and gradients together, as the forward rule of `_weighted`."""
    make = shard_map_over_tokens(
        functools.partial(_losses_and_gradients, chunk=chunk),
        # Axes of the states, the head, the targets and the weights.
        inputs=(_STATES, (None, None), _STATES[1:3], _STATES[:3]),
        outputs=_STATES[:3],
    )

    (losses, hidden_grad), head_grad = make(hidden, head.astype(hidden.dtype), targets, weights)
    return (jnp.sum(weights * losses), losses), (hidden_grad, head_grad.astype(head.dtype), losses)


def _losses_and_gradients(
    hidden: Array, head: Array, targets: Array, weights: Array, *, chunk: int
) -> tuple[tuple[Array, Array], Array]:
    """Returns losses and gradients of the states for the given tokens, and the gradient of the head, summed over them.

    The gradients are those of `sum(weights * losses)`.
    """

    def step(head_grad: Array, chunk_of_all: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        states, labels, weight = chunk_of_all
        logits = _logits(states, head)
        log_norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        is_target = _is_target(logits, labels)
        loss = log_norm[..., 0] - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        # The derivative of the weighted cross-entropy with respect to the logits: softmax minus one-hot target.
        logits_grad = (jnp.exp(logits - log_norm) - is_target.astype(jnp.float32)) * weight[..., None]
        # The products run in the dtype of the states. The gradient of the head is summed in float32.
        logits_grad = logits_grad.astype(states.dtype)

        states_grad = jnp.einsum("bcv,dv->bcd", logits_grad, head)
        head_grad += _head_gradient(states, logits_grad)

        return head_grad, (loss, states_grad)

    chunks = _split(hidden, targets, chunk, weights)
    head_grad, (losses, hidden_grad) = jax.lax.scan(step, jnp.zeros(head.shape, jnp.float32), chunks)

    losses, hidden_grad = (_join(chunks, hidden.shape[:3]) for chunks in (losses, hidden_grad))
    return (losses, hidden_grad), head_grad


def _head_gradient(states: Float[Array, "B C D"], logits_grad: Float[Array, "B C V"]) -> Float[Array, "D V"]:
    """Returns the gradient of the head, summed over all tokens in float32."""
    if target_platform() != "cpu":
        return jnp.einsum("bcd,bcv->dv", states, logits_grad, preferred_element_type=jnp.float32)

    # XLA's CPU product with a transposed left operand is half as fast as this one, and would undo the transpose.
    width, vocab_size = states.shape[-1], logits_grad.shape[-1]
    columns = jax.lax.optimization_barrier(states.reshape(-1, width).T)
    return jnp.matmul(columns, logits_grad.reshape(-1, vocab_size), preferred_element_type=jnp.float32)


def _weighted_backward(chunk: int, saved: tuple[Array, Array, Array], cotangents: tuple[Array, Array]) -> PyTree:
    """Scales the gradients of the forward pass, as the backward rule of `_weighted`."""
    del chunk
    hidden_grad, head_grad, losses = saved
    scale, _ = cotangents  # the losses are returned through stop_gradient, so their cotangent is zero
    return scale.astype(hidden_grad.dtype) * hidden_grad, scale * head_grad, None, scale * losses


_weighted.defvjp(_weighted_forward, _weighted_backward)


# Logits of a chunk


def _logits(states: Float[Array, "B C D"], head: Float[Array, "D V"]) -> Float[Array, "B C V"]:
    """Returns logits in float32 from a product in the dtype of the states."""
    return jnp.einsum("bcd,dv->bcv", states, head.astype(states.dtype), preferred_element_type=jnp.float32)


def _is_target(logits: Float[Array, "B C V"], labels: Int[Array, "B C"]) -> Bool[Array, "B C V"]:
    """Returns a one-hot mask of the targets.

    A comparison fuses, unlike a gather, and a vocabulary that is sharded over devices needs no communication.
    """
    return jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]


def _cross_entropy(logits: Float[Array, "B C V"], labels: Int[Array, "B C"]) -> Float[Array, "B C"]:
    """Returns `logsumexp(logits) - logits[label]`."""
    at_target = jnp.sum(jnp.where(_is_target(logits, labels), logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - at_target


# Chunks


def _over_chunks(
    function: Callable[[Array, Array, Array], R], hidden: Array, head: Array, targets: Array, chunk: int
) -> R:
    """Applies `function(states [B, C, D], head, labels [B, C])` to every loop and chunk.

    The leaves of its result are returned with axes [T, B, S].
    """

    def of_own_tokens(hidden: Array, head: Array, targets: Array) -> tuple[R, tuple[()]]:
        chunks = _split(hidden, targets, chunk)
        results = jax.lax.map(lambda one: function(one[0], head, one[1]), chunks)
        return jax.tree.map(lambda leaf: _join(leaf, hidden.shape[:3]), results), ()

    inputs = _STATES, (None, None), _STATES[1:3]
    results, _ = shard_map_over_tokens(of_own_tokens, inputs, _STATES[:3])(hidden, head, targets)
    return results


def _split(hidden: Array, targets: Array, chunk: int, weights: Array | None = None) -> tuple[Array, ...]:
    """Splits arrays into chunks along a new leading axis, loops outermost.

    The sequence is padded to a multiple of the size of a chunk.
    """
    loops, _, length, _ = hidden.shape
    size = min(chunk, length)
    count = -(-length // size)

    def split(x: Array) -> Array:  # [T, B, S, ...] -> [T * count, B, size, ...]
        padded = jnp.pad(x, [(0, 0), (0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 3))
        chunks = padded.reshape(x.shape[0], x.shape[1], count, size, *x.shape[3:])
        return jnp.moveaxis(chunks, 2, 1).reshape(x.shape[0] * count, x.shape[1], size, *x.shape[3:])

    # The targets are the same in all loops.
    labels = jnp.broadcast_to(targets, (loops, *targets.shape))
    return (split(hidden), split(labels)) if weights is None else (split(hidden), split(labels), split(weights))


def _join(chunks: Array, shape: tuple[int, ...]) -> Array:
    """Reverses `_split`: [T * count, B, size, ...] -> [T, B, S, ...]."""
    loops, batch, length = shape
    count = chunks.shape[0] // loops

    whole = jnp.moveaxis(chunks.reshape(loops, count, *chunks.shape[1:]), 1, 2)
    return whole.reshape(loops, batch, count * chunks.shape[2], *chunks.shape[3:])[:, :, :length]
