"""When to stop looping: pure functions on gate logits, usable with any model."""

from looplm_jax.halting.exit_distribution import (
    entropy,
    exit_cdf,
    exit_distribution,
    log_exit_distribution,
    log_survival,
    mean_exit_loop,
    q_exit,
)
from looplm_jax.halting.policies import ExitPolicy, FixedLoops, QExit, parse_exit_policy
from looplm_jax.halting.priors import geometric, kl_divergence, log_prior, poisson_log_normal, uniform

__all__ = [
    "ExitPolicy",
    "FixedLoops",
    "QExit",
    "entropy",
    "exit_cdf",
    "exit_distribution",
    "geometric",
    "kl_divergence",
    "log_exit_distribution",
    "log_prior",
    "log_survival",
    "mean_exit_loop",
    "parse_exit_policy",
    "poisson_log_normal",
    "q_exit",
    "uniform",
]
