"""The type checkers that the import hooks in conftest.py apply to every function of the library."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

# An int may be passed as a float, as PEP 484 has it.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """Applies beartype, except to constructors: JAX rebuilds pytrees with placeholders instead of arrays."""
    if function.__name__ == "__init__":
        return function
    with warnings.catch_warnings():
        # Types of other libraries are still written as in Python 3.8.
        warnings.simplefilter("ignore", BeartypeDecorHintPep585DeprecationWarning)
        return _checked(function)


def shapes_checked(function: Callable) -> Callable:
    """Applies beartype to arguments and results whose annotations are shapes of arrays, and to no others."""
    shapes = {name: hint for name, hint in function.__annotations__.items() if _is_shape(hint)}
    function.__annotations__ = shapes
    return checked(function) if shapes else function


def install() -> None:
    """Makes the import hook of jaxtyping decorate only functions with shapes in their signatures.

    It would decorate every function, which costs every call of a small function, and every creation of a local one,
    much more time than the function itself takes.
    """
    jaxtyping.jaxtyped = functools.partial(_jaxtyped, jaxtyping.jaxtyped)


def _jaxtyped(original: Callable, function: Any = None, *, typechecker: Callable) -> Any:
    if function is None:
        return functools.partial(_jaxtyped, original, typechecker=typechecker)
    shaped = not isinstance(function, type) and any(map(_is_shape, function.__annotations__.values()))
    return original(function, typechecker=typechecker) if shaped else function


def _is_shape(hint: Any) -> bool:
    return "jaxtyping." in repr(hint)
