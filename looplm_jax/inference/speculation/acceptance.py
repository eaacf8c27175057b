"""The test that drafts must pass, so that what is kept is distributed as if the verifier alone had drawn it."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@flax.struct.dataclass
class Acceptance:
    """The first `counts[n]` of `tokens[n]` are kept: `accepted[n]` drafts, and a corrected token after a rejected one.

    Where all k drafts pass, these are the k tokens, and nothing is corrected.
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
    """Keep draft x with probability `min(1, p(x) / q(x))`; draw from `max(p - q, 0)`, normalised, after the last kept.

    Speculative sampling (Leviathan et al., arXiv 2211.17192, section 2.3). Where p and q have all their weight on one
    token, this is greedy verification: drafts are kept as long as they are what the verifier takes.

    Args:
      drafts: k tokens of each row.
      target: p, by which they should be distributed, given the drafts before.
      proposal: q, by which they were drawn.
      keys: independent of those that drew the drafts.
    """
    size = drafts.shape[1]
    test_keys, correction_keys = jnp.moveaxis(jax.vmap(jax.vmap(jax.random.split))(keys), -1, 0)
    chance = jax.vmap(jax.vmap(jax.random.uniform))(test_keys)
    passed = chance * _of(proposal, drafts) < _of(target, drafts)
    accepted = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=1), axis=1)

    rows, rejected = jnp.arange(drafts.shape[0]), jnp.minimum(accepted, size - 1)
    wanted = target[rows, rejected]
    residual = jnp.maximum(wanted - proposal[rows, rejected], 0)
    # Rounding may leave nothing where p and q are all but equal.
    weights = jnp.where(jnp.any(residual > 0, axis=-1, keepdims=True), residual, wanted)
    corrected = jax.vmap(jax.random.categorical)(correction_keys[rows, rejected], jnp.log(weights))
    tokens = jnp.where(jnp.arange(size) == accepted[:, None], corrected[:, None].astype(jnp.int32), drafts)
    return Acceptance(tokens=tokens, counts=jnp.minimum(accepted + 1, size), accepted=accepted)


def _of(probabilities: Float[Array, "N k V"], tokens: Int[Array, "N k"]) -> Float[Array, "N k"]:
    return jnp.take_along_axis(probabilities, tokens[..., None], axis=-1)[..., 0]
