"""The type checker that the import hook in conftest.py puts on every function of the library."""

from collections.abc import Callable

from beartype import beartype


def checked(function: Callable) -> Callable:
    """Beartype, except on constructors: JAX rebuilds PyTrees with whatever it carries in the place of arrays."""
    return function if function.__name__ == "__init__" else beartype(function)
