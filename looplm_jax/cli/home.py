"""Expands `~` in paths. Shells do not expand it in quotes or in `--out=~/runs`, and recipes are not read by a shell."""

import argparse
import os
from pathlib import Path
from typing import Any

_PATHS = (
    *("checkpoint", "data", "decontaminate", "folder", "include_path", "json", "out", "prompt_file", "recipe", "root"),
    *("sources", "tokenizer", "write"),
)


def expand_home(value: Any) -> Any:
    """Returns a path, or a list of paths, with a leading `~/` or `~user/` expanded; other values unchanged."""
    if isinstance(value, list):
        return [expand_home(each) for each in value]
    # argparse has already converted some arguments to Path.
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def expand_home_everywhere(tree: Any) -> Any:
    """Returns nested dictionaries and lists with every string that starts with `~/` expanded. Only paths start so."""
    if isinstance(tree, dict):
        return {key: expand_home_everywhere(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [expand_home_everywhere(value) for value in tree]
    return os.path.expanduser(tree) if isinstance(tree, str) and tree.startswith("~/") else tree


def expand_paths(arguments: argparse.Namespace) -> None:
    """Expands every argument that names a file or a folder."""
    for name in _PATHS:
        if hasattr(arguments, name):
            setattr(arguments, name, expand_home(getattr(arguments, name)))
