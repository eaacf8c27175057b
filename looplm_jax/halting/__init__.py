"""When to stop looping: exit distributions, priors over loops and exit policies, usable with any looped model.

    pdf = exit_distribution(gate_logits)  # [T, B] -> [T, B], probabilities
    loops = q_exit(pdf, 0.5)  # [B], in 1..T
    loops = exit_loops(KLDivergence(threshold=1e-3), hidden, gate_logits, logits)  # [B], in 1..T

Exit distribution, from gate logits: `exit_distribution`, `log_exit_distribution`, `log_survival`, `exit_cdf`,
`entropy`, `mean_exit_loop`, `q_exit`. Note that `entropy` takes log-probabilities.

Priors, as log-probabilities: `uniform`, `geometric`, `poisson_log_normal`, `log_prior`, and `kl_divergence` from one.

Exit policies that read the number of the loop or the gate: `FixedLoops`, `QExit`. Those that read states or
predictions: `HiddenDifference`, `RelativeHiddenDifference`, `KLDivergence`, `EntropyChange`, `ArgmaxStable`,
`Confidence`, `Margin`. Wrappers: `Bounded`, `Custom`. `parse_exit_policy` reads text such as `q=0.5`, and `exit_loops`
applies a policy to the outputs of all loops.

`Needs`, `Signals`, `LoopMemory` and `PolicyTable` are for programs that apply policies loop by loop.
"""

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
