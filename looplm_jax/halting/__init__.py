"""When to stop looping: exit distributions, priors over loops and exit policies, usable with any looped model.

Functions take arrays whose first axis is the loop, and any axes of tokens after it.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from looplm_jax.halting import exit_distribution, mean_exit_loop, q_exit
    >>> gate_logits = jnp.array([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])  # [T, B]: four loops, two tokens
    >>> exit_pdf = exit_distribution(gate_logits)  # [T, B], sums to one over loops
    >>> q_exit(exit_pdf, 0.5)  # the loop at which each token exits, in 1..T
    Array([2, 1], dtype=int32)
    >>> print(mean_exit_loop(exit_pdf))
    [2.37... 1.87...]

A policy decides the same from what the model computes loop by loop. `parse_exit_policy` reads the text of a flag:

    >>> from looplm_jax.halting import Bounded, QExit, parse_exit_policy
    >>> parse_exit_policy("q=0.5,min=2") == Bounded(QExit(q=0.5), min_loops=2)
    True

Adaptive Computation Time halts where probabilities, added up, reach one. Its weights are an exit distribution too:

    >>> from looplm_jax.halting import act, ponder_cost
    >>> weights, remainders, updates = act(jax.nn.sigmoid(gate_logits))
    >>> print(weights[:, 1], updates)
    [0.5 0.5 0.  0. ] [3 2]
    >>> print(ponder_cost(remainders, updates))  # the mean number of loops, plus the mean remainder
    2.94...

Exit distribution: `exit_distribution`, `log_exit_distribution`, `log_survival`, from gate logits, and
`log_exit_probability`, of given exits; `exit_cdf`, `mean_exit_loop`, `q_exit`, from probabilities; `entropy`, from
log-probabilities, by keyword.

Adaptive Computation Time: `act`, from halting probabilities to an `ACT`; `ponder_cost`; the state that is read out,
`weighted_state`, or `interpolated_state` as in the published code.

Priors, as log-probabilities over 1..T: `log_prior` for a configuration; `log_uniform_prior`, `log_geometric_prior`,
`log_poisson_lognormal_prior`; and `kl_divergence` from one.

Policies: `FixedLoops`, `QExit`, `SampledExit`; `HiddenDifference`, `RelativeHiddenDifference`,
`RelativeStateDifference`, `CosineChange`; `KLDivergence`, `MinPDivergence`, `EntropyChange`, `ArgmaxStable`,
`Confidence`, `Margin`; bounds around any policy, `Bounded`; and a policy from a function, `Custom`. `exit_loops`
applies a policy to the outputs of all loops.

An own policy implements `ExitPolicy`; it declares what it reads with `looplm_jax.halting.signals.Needs`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # Adaptive Computation Time, from halting probabilities.
    from looplm_jax.halting._act import ACT, act, interpolated_state, ponder_cost, weighted_state

    # The exit distribution, from gate logits.
    from looplm_jax.halting._distribution import (
        entropy,
        exit_cdf,
        exit_distribution,
        log_exit_distribution,
        log_exit_probability,
        log_survival,
        mean_exit_loop,
        q_exit,
    )

    # Text of a flag to a policy.
    from looplm_jax.halting._parse import parse_exit_policy

    # Exit policies.
    from looplm_jax.halting._policies import (
        ArgmaxStable,
        Bounded,
        Confidence,
        CosineChange,
        Custom,
        EntropyChange,
        ExitPolicy,
        FixedLoops,
        HiddenDifference,
        KLDivergence,
        Margin,
        MinPDivergence,
        QExit,
        RelativeHiddenDifference,
        RelativeStateDifference,
        SampledExit,
    )

    # A policy applied to the outputs of all loops.
    from looplm_jax.halting._policy_table import exit_loops

    # Priors over loops, as log-probabilities.
    from looplm_jax.halting._priors import (
        kl_divergence,
        log_geometric_prior,
        log_poisson_lognormal_prior,
        log_prior,
        log_uniform_prior,
    )

__all__ = [
    "ACT",
    "ArgmaxStable",
    "Bounded",
    "Confidence",
    "CosineChange",
    "Custom",
    "EntropyChange",
    "ExitPolicy",
    "FixedLoops",
    "HiddenDifference",
    "KLDivergence",
    "Margin",
    "MinPDivergence",
    "QExit",
    "RelativeHiddenDifference",
    "RelativeStateDifference",
    "SampledExit",
    "act",
    "entropy",
    "exit_cdf",
    "exit_distribution",
    "exit_loops",
    "interpolated_state",
    "kl_divergence",
    "log_exit_distribution",
    "log_exit_probability",
    "log_geometric_prior",
    "log_poisson_lognormal_prior",
    "log_prior",
    "log_survival",
    "log_uniform_prior",
    "mean_exit_loop",
    "parse_exit_policy",
    "ponder_cost",
    "q_exit",
    "weighted_state",
]
