"""Sizes of all arrays that a program computes, before and after XLA."""

import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

_HLO_ARRAY = re.compile(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]")


def jaxpr_sizes(jaxpr: Jaxpr) -> Iterator[int]:
    """Returns the number of elements of each result of each equation, also in loops, branches and nested calls."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(var.aval.shape)) for var in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from jaxpr_sizes(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def hlo_sizes(text: str) -> Iterator[int]:
    """Returns the number of elements of each array in compiled HLO."""
    for dims in _HLO_ARRAY.findall(text):
        yield int(np.prod([int(size) for size in dims.split(",") if size]))


def _is_jaxpr(value: object) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
