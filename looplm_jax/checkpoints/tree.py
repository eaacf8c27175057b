"""Converts a pytree to a flat dictionary with dotted names, and back."""

from typing import Any

import jax


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every leaf under its dotted name, such as `params.core.attention.query`.

    Args:
      tree: a pytree.
      prefix: the name of the tree itself.

    Raises:
      ValueError: two leaves have the same name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = ".".join(part for part in (prefix, jax.tree_util.keystr(path, simple=True, separator=".")) if part)
        if name in named:
            raise ValueError(f"two arrays of the state are called {name!r}")
        named[name] = leaf

    return named


def unflatten(named: dict[str, Any], like: Any, prefix: str = "") -> Any:
    """Returns a tree with the structure of `like`; the inverse of `flatten`."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in flatten(like, prefix)])


def below(named: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the entries that belong to the tree `prefix`: those that `flatten(tree, prefix)` would name."""
    return {name: leaf for name, leaf in named.items() if not prefix or name == prefix or name.startswith(prefix + ".")}
