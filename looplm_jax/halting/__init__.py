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
from looplm_jax.halting.first_exit import exit_loops
from looplm_jax.halting.policies import Bounded, Custom, ExitPolicy, FixedLoops, QExit
from looplm_jax.halting.policy_table import PolicyTable
from looplm_jax.halting.policy_text import parse_exit_policy
from looplm_jax.halting.priors import geometric, kl_divergence, log_prior, poisson_log_normal, uniform
from looplm_jax.halting.readouts import (
    ArgmaxStable,
    Confidence,
    EntropyChange,
    HiddenDifference,
    KLDivergence,
    Margin,
    RelativeHiddenDifference,
)
from looplm_jax.halting.signals import LoopMemory, Needs, Signals

__all__ = [
    "ArgmaxStable",
    "Bounded",
    "Confidence",
    "Custom",
    "EntropyChange",
    "ExitPolicy",
    "FixedLoops",
    "HiddenDifference",
    "KLDivergence",
    "LoopMemory",
    "Margin",
    "Needs",
    "PolicyTable",
    "QExit",
    "RelativeHiddenDifference",
    "Signals",
    "entropy",
    "exit_cdf",
    "exit_distribution",
    "exit_loops",
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
