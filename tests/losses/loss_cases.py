"""Random states, heads and targets, and the naive cross-entropy, which computes all logits at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LossCase:
    hidden: jax.Array
    head: jax.Array
    targets: jax.Array
    gates: jax.Array
    mask: jax.Array


def random_case(loops=3, batch=2, length=6, vocab=11, width=5, seed=0) -> LossCase:
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    return LossCase(
        hidden=normal(loops, batch, length, width),
        head=normal(width, vocab),
        targets=jnp.asarray(random.integers(0, vocab, (batch, length)), jnp.int32),
        gates=2 * normal(loops, batch, length),
        mask=jnp.asarray(random.random((batch, length)) < 0.7, jnp.float32),
    )


def naive_losses(hidden, head, targets):
    log_probabilities = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head)
    labels = jnp.broadcast_to(targets, hidden.shape[:3])
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]


def assert_trees_close(ours, theirs, tolerance=1e-5):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, ours, theirs)
