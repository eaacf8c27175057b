"""Acceptance of drafts, such that the kept tokens are distributed as if the verifier alone had drawn them."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@flax.struct.dataclass
class Acceptance:
    """The result of verification: the first `counts[n]` of `tokens[n]` are kept.

    These are `accepted[n]` drafts, and a corrected token after a rejected one. If all k drafts pass, they are the k
    tokens, and nothing is corrected.
    """

    tokens: Int[Array, "N k"]
    counts: Int[Array, "N"]
    accepted: Int[Array, "N"]


def accept(
    drafts: Int[Array, "N k"],
    target: Float[Array, "N k V"],
    proposal: Float[Array, "N k V"],
    keys: Key[Array, "N k"],
) -> Acceptance:
    """Keeps draft x with probability `min(1, p(x) / q(x))`, and draws a correction from `max(p - q, 0)`, normalized.

    The correction follows the last draft that is kept. This is speculative sampling (Leviathan et al., arXiv
    2211.17192, section 2.3). If p and q each have all their weight on one token, it is greedy verification: drafts are
    kept as long as they equal the verifier's choice.

    Args:
      drafts: k tokens per sequence.
      target: p, the distribution that the tokens should follow, given the drafts before them.
      proposal: q, the distribution from which the drafts were drawn.
      keys: random keys, independent of those that drew the drafts.
    """
    size = drafts.shape[1]
    # [N, k, 2] -> 2 x [N, k]
    test_keys, correction_keys = jnp.moveaxis(jax.vmap(jax.vmap(jax.random.split))(keys), -1, 0)
    chance = jax.vmap(jax.vmap(jax.random.uniform))(test_keys)
    # Without a division: q may be tiny, and a draft that p excludes must fail even for chance 0.
    passed = chance * _of(proposal, drafts) < _of(target, drafts)
    # The cumulative product is 0 after the first rejected draft.
    accepted = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=1), axis=1)

    rows, rejected = jnp.arange(drafts.shape[0]), jnp.minimum(accepted, size - 1)
    # [N, V]; unused for rows without a rejected draft.
    wanted = target[rows, rejected]
    residual = jnp.maximum(wanted - proposal[rows, rejected], 0)
    # Rounding may leave no weight if p and q are almost equal.
    weights = jnp.where(jnp.any(residual > 0, axis=-1, keepdims=True), residual, wanted)
    corrected = jax.vmap(jax.random.categorical)(correction_keys[rows, rejected], jnp.log(weights))

    # The correction replaces the first rejected draft.
    tokens = jnp.where(jnp.arange(size) == accepted[:, None], corrected[:, None].astype(jnp.int32), drafts)
    return Acceptance(tokens=tokens, counts=jnp.minimum(accepted + 1, size), accepted=accepted)


def _of(probabilities: Float[Array, "N k V"], tokens: Int[Array, "N k"]) -> Float[Array, "N k"]:
    """Returns the probability of each token."""
    return jnp.take_along_axis(probabilities, tokens[..., None], axis=-1)[..., 0]
