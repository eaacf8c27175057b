"""The exit distribution (paper v4, section 3.2), from gate logits, in float32 (or float64, as given) and log space.

    lambda_t = sigmoid(gate_t),  S_t = prod_{j<=t} (1 - lambda_j),  S_0 = 1
    p_t = lambda_t S_{t-1} for t < T,  p_T = S_{T-1}   (the last gate is not used)

The leading axis, T, is that of loops. Log space is accurate for saturated gates: `log sigmoid` is finite where a
sigmoid rounds to 0 or 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def at_least_float32(values: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns the values in float32, or in float64 if they are."""
    values = jnp.asarray(values)
    # Tests compute in float64, which stays.
    return values if jnp.finfo(values.dtype).bits >= 32 else values.astype(jnp.float32)


def log_survival(gate_logits: Float[Array, "T *B"]) -> Float[Array, "T *B"]:
    """Returns `log S_t` for t = 1..T: the log-probability of no exit up to loop t, counting the last gate too."""
    # log(1 - sigmoid(x)) = log sigmoid(-x), without cancellation for large x.
    return jnp.cumsum(jax.nn.log_sigmoid(-at_least_float32(gate_logits)), axis=0)


def log_exit_distribution(gate_logits: Float[Array, "T *B"]) -> Float[Array, "T *B"]:
    """Returns `log p_t`. It is accurate and has finite gradients for any finite gates."""
    logits = at_least_float32(gate_logits)
    reached = jnp.concatenate([jnp.zeros_like(logits[:1]), log_survival(logits[:-1])])  # log S_{t-1}
    exits = jnp.concatenate([jax.nn.log_sigmoid(logits[:-1]), jnp.zeros_like(logits[:1])])  # log lambda_t; 0 at T
    return reached + exits


def log_exit_probability(gate_logits: Float[Array, "T *B"], exit_loops: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns `log p(e)`, the log-probability of an exit at the given loops, in 1..T.

        log p(e) = sum_{j<e} log(1 - lambda_j) + [e < T] log lambda_e

    It reads the gates of loops 1..e only, because deeper states of a token that has left mean nothing in a replay.
    Gates after the exit may have any value, and have gradients of exactly 0.
    """
    loops = jnp.arange(1, gate_logits.shape[0] + 1, dtype=exit_loops.dtype).reshape(-1, *[1] * exit_loops.ndim)
    earlier = loops < exit_loops[None]
    exits = (loops == exit_loops[None]) & (loops < gate_logits.shape[0])

    # Gates that are not read are replaced first: a gradient of 0 times one that is not finite would not be finite.
    logits = jnp.where(earlier | exits, at_least_float32(gate_logits), 0.0)
    terms = jax.nn.log_sigmoid(jnp.where(earlier, -logits, logits))
    return jnp.sum(jnp.where(earlier | exits, terms, 0.0), axis=0)


def exit_distribution(gate_logits: Float[Array, "T *B"]) -> Float[Array, "T *B"]:
    """Returns `p_t`, the probability of an exit after loop t. It sums to one over loops."""
    return jnp.exp(log_exit_distribution(gate_logits))


def exit_cdf(exit_pdf: Float[Array, "T *B"]) -> Float[Array, "T *B"]:
    """Returns `CDF(n)`, the probability of an exit at loop n or earlier: `1 - S_n`, and exactly 1 at T."""
    return 1.0 - _tail(exit_pdf)


def entropy(*, log_pdf: Float[Array, "T *B"]) -> Float[Array, "*B"]:
    """Returns `H(p) = -sum_t p_t log p_t` in nats, from the log-probabilities of `log_exit_distribution`."""
    return -jnp.sum(jnp.exp(log_pdf) * log_pdf, axis=0)


def mean_exit_loop(exit_pdf: Float[Array, "T *B"]) -> Float[Array, "*B"]:
    """Returns the mean exit loop `sum_t t p_t`, from probabilities."""
    loops = jnp.arange(1, exit_pdf.shape[0] + 1, dtype=exit_pdf.dtype)
    return jnp.tensordot(loops, exit_pdf, axes=1)


def q_exit(exit_pdf: Float[Array, "T *B"], q: float | Float[Array, ""]) -> Int[Array, "*B"]:
    """Returns the loop of Q-exit, `min { m : CDF(m) >= q }`, in 1..T, for q in [0, 1].

    q = 0 is loop 1. q = 1 is loop T even if the survival underflows.
    """
    tail = _tail(exit_pdf)
    q = jnp.asarray(q, tail.dtype)
    # The condition is tested as S_m <= 1 - q, because 1 - S_m rounds to one long before S_m is zero.
    exited = (tail <= 1.0 - q) & (q < 1.0)
    exited = exited.at[-1].set(True)
    return jnp.argmax(exited, axis=0).astype(jnp.int32) + 1


def _tail(exit_pdf: Float[Array, "T *B"]) -> Float[Array, "T *B"]:
    """Returns `S_n` for n < T, and 0 at T.

    Sums start at the last loop, so that small survivals keep their precision.
    """
    sums = jnp.cumsum(at_least_float32(exit_pdf)[::-1], axis=0)[::-1]
    return jnp.concatenate([sums[1:], jnp.zeros_like(sums[:1])])
