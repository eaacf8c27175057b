"""Exit policies in the syntax of the command line."""

import pytest

from looplm_jax.errors import UserError
from looplm_jax.halting import (
    ArgmaxStable,
    Bounded,
    Confidence,
    CosineChange,
    EntropyChange,
    FixedLoops,
    HiddenDifference,
    KLDivergence,
    Margin,
    MinPDivergence,
    QExit,
    RelativeHiddenDifference,
    RelativeStateDifference,
    SampledExit,
    parse_exit_policy,
)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("loops=4", FixedLoops(loops=4)),
        ("q=0.5", QExit(q=0.5)),
        ("q=0", QExit(q=0.0)),
        ("q=1", QExit(q=1.0)),
        ("hidden=0.03", HiddenDifference(threshold=0.03)),
        ("relative=0.03", RelativeHiddenDifference(threshold=0.03)),
        ("kl=1e-3", KLDivergence(threshold=1e-3)),
        ("kl=1e-3,reverse", KLDivergence(threshold=1e-3, reverse=True)),
        (
            "kl=5e-4, from_uniform,max=6,reverse",
            Bounded(KLDivergence(threshold=5e-4, reverse=True, from_uniform=True), max_loops=6),
        ),
        ("minp_kl=1e-5,from_uniform", MinPDivergence(threshold=1e-5, from_uniform=True)),
        ("state=0.03", RelativeStateDifference(threshold=0.03)),
        ("cosine=1e-3", CosineChange(threshold=1e-3)),
        ("entropy=1e-3", EntropyChange(threshold=1e-3)),
        ("stable=2", ArgmaxStable(times=2)),
        ("confidence=0.9", Confidence(probability=0.9)),
        ("margin=0.5", Margin(margin=0.5)),
        ("sampled", SampledExit()),
        ("sampled,max=3", Bounded(SampledExit(), max_loops=3)),
        ("q=0.5,min=2,max=6", Bounded(QExit(q=0.5), min_loops=2, max_loops=6)),
        ("q=0.5,max=6,min=2", Bounded(QExit(q=0.5), min_loops=2, max_loops=6)),
        (" kl = 1e-3 , min = 2 ", Bounded(KLDivergence(threshold=1e-3), min_loops=2)),
        ("stable=1,max=3", Bounded(ArgmaxStable(times=1), max_loops=3)),
    ],
)
def test_policies_are_read_as_typed(text, policy):
    assert parse_exit_policy(text) == policy


ONLY_BOUNDS = "only min and max may follow the rule"
KNOWN = "confidence, cosine, entropy, hidden, kl, loops, margin, minp_kl, q, relative, sampled, stable, state"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampled=1", "exit policy 'sampled=1': sampled takes no number; write sampled"),
        ("loops=0", "loops must be at least 1, not 0"),
        ("loops=2.5", "exit policy 'loops=2.5': '2.5' is not a whole number; write for example loops=4"),
        ("loops", "exit policy 'loops': '' is not a whole number; write for example loops=4"),
        ("q=half", "exit policy 'q=half': 'half' is not a number; write for example q=0.5"),
        ("q=1.5", "q must be in [0, 1], not 1.5"),
        ("q=-0.1", "q must be in [0, 1], not -0.1"),
        ("q=nan", "q must be in [0, 1], not nan"),
        ("kl=0", "the threshold of KLDivergence must be positive, not 0.0"),
        ("stable=0", "times must be at least 1, not 0"),
        ("confidence=2", "probability must be in [0, 1], not 2.0"),
        (
            "minp_kl=1e-5,reverse",
            f"exit policy 'minp_kl=1e-5,reverse': {ONLY_BOUNDS}, not 'reverse'; write for example q=0.5,min=2,max=6",
        ),
        ("margin=x", "exit policy 'margin=x': 'x' is not a number; write for example margin=0.5"),
        ("loop=4", "unknown exit policy 'loop=4'; did you mean 'loops'?"),
        ("", f"unknown exit policy ''; write for example q=0.5, with one of {KNOWN}"),
        (
            "min=2,q=0.5",
            "unknown exit policy 'min=2,q=0.5'; the rule comes before min and max, as in q=0.5,min=2",
        ),
        ("q=0.5,min=3,max=2", "min_loops=3 is above max_loops=2; lower it"),
        ("q=0.5,min=0", "min_loops must be at least 1, not 0"),
        ("q=0.5,min=two", "exit policy 'q=0.5,min=two': 'two' is not a whole number; write for example min=2"),
        ("q=0.5,min=2,min=3", "exit policy 'q=0.5,min=2,min=3': min is given twice; keep one"),
        (
            "q=0.5,loops=4",
            f"exit policy 'q=0.5,loops=4': {ONLY_BOUNDS}, not 'loops'; write for example q=0.5,min=2,max=6",
        ),
        ("q=0.5,", f"exit policy 'q=0.5,': {ONLY_BOUNDS}, not ''; write for example q=0.5,min=2,max=6"),
    ],
)
def test_anything_else_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse_exit_policy(text)
    assert str(error.value) == message
