"""Priors over exit loops, as log-probabilities over 1..T, and the divergence of an exit distribution from a prior."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from looplm_jax.config import PriorConfig, PriorKind

_HERMITE_NODES = 64


def log_uniform_prior(loops: int) -> Float[Array, "T"]:
    """Returns `log(1 / T)` for each loop, the prior to which the entropy term of Eq. 4 corresponds."""
    return jnp.full((loops,), -jnp.log(jnp.float32(loops)))


def log_geometric_prior(loops: int, rate: float) -> Float[Array, "T"]:
    """Returns the log of `rate (1 - rate)^(t-1)`, truncated at T and renormalized (PonderNet)."""
    steps = jnp.arange(loops, dtype=jnp.float32)
    # The softmax normalizes the truncated distribution, so the constant factor `rate` cancels.
    return jax.nn.log_softmax(steps * jnp.log1p(-jnp.float32(rate)))


def log_poisson_lognormal_prior(loops: int, mean: float, sigma: float) -> Float[Array, "T"]:
    """Returns the log-probabilities of a Poisson log-normal prior, truncated at T and renormalized (Huginn).

    The number of loops is `1 + Poisson(rate)` with `log rate ~ Normal(log(mean - 1) - sigma^2 / 2, sigma)`. The
    integral over the rate is a Gauss-Hermite quadrature.

    Args:
      loops: the number of loops, T.
      mean: the mean number of loops before truncation; must exceed 1.
      sigma: the standard deviation of the log-rate.
    """
    nodes, weights = _hermite(_HERMITE_NODES)
    # A log-normal variable has the mean exp(mu + sigma^2 / 2), hence the subtraction.
    log_rate = jnp.log(jnp.float32(mean - 1.0)) - sigma**2 / 2 + sigma * nodes

    counts = jnp.arange(loops, dtype=jnp.float32)
    # The log-probability of each count at each node of the quadrature, [T, N].
    counts, log_rate = counts[:, None], log_rate[None]
    log_poisson = counts * log_rate - jnp.exp(log_rate) - jax.lax.lgamma(counts + 1.0)
    # The sum over nodes is the integral; the softmax truncates at T.
    return jax.nn.log_softmax(jax.nn.logsumexp(log_poisson, axis=1, b=weights[None]))


def log_prior(config: PriorConfig, loops: int) -> Float[Array, "T"]:
    """Returns the log-probabilities of the prior of a stage's configuration."""
    match config.kind:
        case PriorKind.UNIFORM:
            return log_uniform_prior(loops)
        case PriorKind.GEOMETRIC:
            return log_geometric_prior(loops, config.rate)
        case PriorKind.POISSON_LOG_NORMAL:
            return log_poisson_lognormal_prior(loops, config.mean, config.sigma)


def kl_divergence(*, log_pdf: Float[Array, "T *B"], log_prior: Float[Array, "T"]) -> Float[Array, "*B"]:
    """Returns `KL(p || prior) = sum_t p_t (log p_t - log prior_t)` in nats."""
    # [T] -> [T, 1, ...]
    prior = log_prior.reshape(-1, *[1] * (log_pdf.ndim - 1))
    return jnp.sum(jnp.exp(log_pdf) * (log_pdf - prior), axis=0)


def _hermite(count: int) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Returns nodes and weights of the quadrature of an expectation over a standard normal variable.

    They are eigenvalues and eigenvectors of a tridiagonal matrix (Golub and Welsch).
    """
    # The off-diagonal elements are the recurrence coefficients of the Hermite polynomials.
    beside = jnp.sqrt(jnp.arange(1, count, dtype=jnp.float32))
    nodes, vectors = jnp.linalg.eigh(jnp.diag(beside, 1) + jnp.diag(beside, -1))
    return nodes, jnp.square(vectors[0])
