"""Parses exit policies from text, as in a command line: `q=0.5`, `kl=1e-3,min=2,max=6`."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from looplm_jax.errors import UserError, suggest
from looplm_jax.halting._policies import (
    ArgmaxStable,
    Bounded,
    Confidence,
    CosineChange,
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

# The policy of each name, which has one numeric field, and an example of its value. Fields of the type bool are
# options, which follow as words.
_RULES: dict[str, tuple[type[Any], str]] = {
    "loops": (FixedLoops, "4"),
    "q": (QExit, "0.5"),
    "hidden": (HiddenDifference, "0.03"),
    "relative": (RelativeHiddenDifference, "0.03"),
    "kl": (KLDivergence, "1e-3"),
    "minp_kl": (MinPDivergence, "1e-5"),
    "state": (RelativeStateDifference, "0.03"),
    "cosine": (CosineChange, "1e-3"),
    "entropy": (EntropyChange, "1e-3"),
    "stable": (ArgmaxStable, "2"),
    "confidence": (Confidence, "0.9"),
    "margin": (Margin, "0.5"),
}
# The policies of names without a number.
_PLAIN_RULES: dict[str, type[Any]] = {"sampled": SampledExit}
_BOUNDS = {"min": "min_loops", "max": "max_loops"}


def parse_exit_policy(text: str) -> ExitPolicy:
    """Returns the exit policy for a rule and its number, followed by options of the rule and bounds on loops.

    Examples: `q=0.5`, `loops=4`, `kl=1e-3,min=2,max=6`, `kl=5e-4,reverse,from_uniform`. The rules are loops, q, hidden,
    relative, state, cosine, kl, minp_kl, entropy, stable, confidence and margin; and `sampled`, which has no number.

    Raises:
      UserError: the text has another form, or the policy does not allow its number.
    """
    rule, *rest = text.split(",")
    policy: Any = _rule(text, rule)  # a dataclass

    options = {part.strip() for part in rest} & _options(policy)
    bounds = [part for part in rest if part.strip() not in options]
    if options:
        policy = dataclasses.replace(policy, **dict.fromkeys(options, True))
    # Bounds only if they are given: `Bounded` without bounds would be another policy than the rule alone.
    return Bounded(policy, **_bounds(text, bounds)) if bounds else policy


def _rule(text: str, part: str) -> ExitPolicy:
    """Returns the policy for a rule such as `q=0.5`."""
    name, value = _split(part)
    if name in _PLAIN_RULES:
        if "=" in part:
            raise UserError(f"exit policy {text!r}: {name} takes no number; write {name}")
        return _PLAIN_RULES[name]()
    if name not in _RULES:
        known = sorted((*_RULES, *_PLAIN_RULES))
        hint = suggest(name, known, otherwise=f"; write for example q=0.5, with one of {', '.join(known)}")
        # A bound is no rule of its own.
        hint = "; the rule comes before min and max, as in q=0.5,min=2" if name in _BOUNDS else hint
        raise UserError(f"unknown exit policy {text!r}{hint}")

    policy, example = _RULES[name]
    # Every rule has exactly one number.
    (field,) = (field for field in dataclasses.fields(policy) if field.type is not bool)
    return policy(**{field.name: _number(text, value, field.type, f"{name}={example}")})


def _options(policy: Any) -> set[str]:
    """Returns the names of the options of a policy in addition to its number."""
    return {field.name for field in dataclasses.fields(policy) if field.type is bool}


def _bounds(text: str, parts: Iterable[str]) -> dict[str, int]:
    """Returns the bounds for parts such as `min=2`."""
    bounds: dict[str, int] = {}
    for name, value in map(_split, parts):
        if name not in _BOUNDS:
            raise UserError(
                f"exit policy {text!r}: only min and max may follow the rule, not {name!r}; "
                "write for example q=0.5,min=2,max=6"
            )

        # A repeated bound is a typing error, and which one was meant is unknown.
        if _BOUNDS[name] in bounds:
            raise UserError(f"exit policy {text!r}: {name} is given twice; keep one")
        bounds[_BOUNDS[name]] = _number(text, value, int, f"{name}=2")
    return bounds


def _split(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    return name.strip(), value.strip()


def _number(text: str, value: str, kind: Any, example: str) -> Any:
    """Returns the number that `value` represents. Raises UserError otherwise."""
    try:
        # `int` refuses 2.5, and the policies check the range.
        return kind(value)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"exit policy {text!r}: {value!r} is not {expected}; write for example {example}") from None
