"""Adaptive Computation Time (1603.08983), as the Universal Transformer uses it (1807.03819, section 2.2).

    N = min { n : p_1 + .. + p_n > 1 - epsilon },  T if there is none      the loop at which a token halts
    R = 1 - (p_1 + .. + p_{N-1})                                           its remainder
    w_t = p_t (t < N),  R (t = N),  0 (t > N)                              its halting weights, which sum to one

The model reads out `sum_t w_t h_t` and pays the ponder cost, the mean of `N + R`. N has no gradient, so the one of the
cost is that of R: -1 for every `p_t` with t < N. The leading axis, T, is that of loops.

The weights are an exit distribution, so `exit_cdf`, `mean_exit_loop` and the losses over exits apply to them.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from looplm_jax.halting._distribution import at_least_float32


class ACT(NamedTuple):
    """The result of `act`: the weight of every loop, and the two terms of the ponder cost."""

    weights: Float[Array, "T *B"]
    remainders: Float[Array, "*B"]
    updates: Int[Array, "*B"]


def act(probabilities: Float[Array, "T *B"], *, epsilon: float = 0.01, forced: bool = True) -> ACT:
    """Computes the halting weights of all loops, in float32 or wider.

    Args:
      probabilities: the halting probability `p_t` of each loop, in [0, 1]: the sigmoid of a gate.
      epsilon: a token halts when the sum of its probabilities exceeds `1 - epsilon`.
      forced: whether the last loop halts the tokens that are still running. If it does not, as in the published code,
        the weights of these tokens are their probabilities, which sum to less than one, and their remainder is 0.

    Returns:
      The weights `w_t`, the remainders R, and the updates: the number of loops, N.
    """
    p = at_least_float32(probabilities)
    loops = p.shape[0]

    halts = jnp.cumsum(p, axis=0) > 1.0 - epsilon
    if forced:
        halts = halts.at[-1].set(True)
    # The loop T + 1 stands for tokens that never halt.
    first = jnp.argmax(halts, axis=0).astype(jnp.int32) + 1
    halting_loop = jnp.where(jnp.any(halts, axis=0), first, loops + 1)

    loop = jnp.arange(1, loops + 1, dtype=jnp.int32).reshape(-1, *[1] * (p.ndim - 1))
    before = jnp.where(loop < halting_loop[None], p, 0.0)
    remainders = jnp.where(halting_loop <= loops, 1.0 - jnp.sum(before, axis=0), 0.0)

    return ACT(
        weights=jnp.where(loop == halting_loop[None], remainders[None], before),
        remainders=remainders,
        updates=jnp.minimum(halting_loop, loops),
    )


def ponder_cost(
    remainders: Float[Array, "*B"], updates: Int[Array, "*B"], *, mask: Float[Array, "*B"] | None = None
) -> Float[Array, ""]:
    """Returns the mean of `N + R` over unmasked tokens. Its gradient is that of the remainders.

    Args:
      remainders: R, from `act`.
      updates: N, from `act`.
      mask: 1 for tokens that count, 0 for others; by default all count.
    """
    costs = updates.astype(remainders.dtype) + remainders
    if mask is None:
        return jnp.mean(costs)

    mask = mask.astype(costs.dtype)
    return jnp.sum(costs * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def weighted_state(weights: Float[Array, "T *B"], states: Float[Array, "T *B D"]) -> Float[Array, "*B D"]:
    """Returns `sum_t w_t h_t`, the state that ACT reads out, in the dtype of the states.

    Args:
      weights: the weights of `act`, or any exit distribution.
      states: the state after every loop.
    """
    weights = at_least_float32(weights)
    wide = np.promote_types(weights.dtype, states.dtype)
    return jnp.sum(weights[..., None].astype(wide) * states.astype(wide), axis=0).astype(states.dtype)


def interpolated_state(weights: Float[Array, "T *B"], states: Float[Array, "T *B D"]) -> Float[Array, "*B D"]:
    """Returns `y_T` of `y_t = w_t h_t + (1 - w_t) y_{t-1}`, `y_0 = 0`, which the published code reads out by default.

    Its weights `w_t prod_{s>t} (1 - w_s)` sum to `1 - prod_t (1 - w_t)`: to one only if the token halts at loop 1.
    Arguments as in `weighted_state`.
    """
    kept = jnp.cumprod(1.0 - weights[::-1], axis=0)[::-1]  # prod_{s>=t} (1 - w_s)
    later = jnp.concatenate([kept[1:], jnp.ones_like(kept[:1])])
    return weighted_state(weights * later, states)
