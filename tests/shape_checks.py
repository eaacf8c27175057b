"""The type checkers that the import hooks in conftest.py apply to every function of the library."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# An int may be passed as a float, as PEP 484 has it.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """Applies beartype, except to constructors: JAX rebuilds pytrees with placeholders instead of arrays."""
    return function if function.__name__ == "__init__" else _checked(function)


def shapes_checked(function: Callable) -> Callable:
    """Applies beartype to arguments and results whose annotations are shapes of arrays, and to no others."""
    shapes = {name: hint for name, hint in function.__annotations__.items() if "jaxtyping." in repr(hint)}
    function.__annotations__ = shapes
    return checked(function) if shapes else function
