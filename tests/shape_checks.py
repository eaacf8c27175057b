"""The type checker that the import hook in conftest.py applies to every function of the library."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# An int may be passed as a float, as PEP 484 has it.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """Applies beartype, except to constructors: JAX rebuilds pytrees with placeholders instead of arrays."""
    return function if function.__name__ == "__init__" else _checked(function)
