"""Traversal and globbing of local folders through symbolic links, without loops."""

import dataclasses
import fnmatch
import os
import re
from collections.abc import Iterator

# Metadata that other programs store next to data. Names that begin with a dot are hidden, too.
_BOOKKEEPING = frozenset(("__MACOSX", "__pycache__", "_delta_log", "_spark_metadata", "_temporary"))
_MAGIC = re.compile(r"[*?\[]")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file below a folder, or a hidden folder, which is not traversed.

    Attributes:
      path: the path.
      linked: whether the path goes through a symbolic link.
    """

    path: str
    linked: bool = False


def is_hidden(name: str) -> bool:
    """Whether a file or folder with this name is ignored unless it is named explicitly."""
    return name.startswith(".") or name in _BOOKKEEPING


def tree(root: str) -> Iterator[Entry]:
    """Yields all files below a folder. Each folder is visited once."""
    entered: set[str] = set()
    folders: list[tuple[str, bool]] = [(root, False)]
    links: list[tuple[str, bool]] = []

    # Links are followed last, so that a folder that is also reachable directly is visited by its own path.
    while folders or links:
        folder, linked = folders.pop() if folders else links.pop(0)

        # Links may form cycles, so folders are recognized by their real path.
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)

        for path, is_link, is_folder in _inside(folder):
            if not is_folder or is_hidden(os.path.basename(path)):
                yield Entry(path, linked or is_link)
            elif is_link:
                links.append((path, True))
            else:
                folders.append((path, linked))


def glob(pattern: str) -> list[str]:
    """Returns the paths that match an absolute pattern, sorted.

    `**` matches any number of folders, or all files below.
    """
    # Several `**` can reach the same path.
    return sorted(set(_expanded("/", pattern.strip("/").split("/"))))


def hidden_in_glob(path: str, pattern: str) -> bool:
    """Whether a match has a hidden component that no hidden component of the pattern matches."""
    spelled = [part for part in pattern.split("/") if is_hidden(part)]
    hidden = [part for part in path.split("/") if is_hidden(part)]
    return any(not any(fnmatch.fnmatchcase(part, known) for known in spelled) for part in hidden)


def fixed_part(pattern: str) -> str:
    """Returns the folder that a pattern begins with, up to its first wildcard."""
    parts = pattern.split("/")
    first = next((number for number, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    return "/".join(parts[:first]) or "/"


def _expanded(folder: str, parts: list[str]) -> Iterator[str]:
    """Yields the paths below a folder that match the components of a pattern."""
    if not parts:
        yield folder
        return

    head, rest = parts[0], parts[1:]
    path = os.path.join(folder, head)
    literal = "*" not in head and os.path.lexists(path)  # even if the name contains wildcards
    if head == "**":
        for below in _folders(folder):
            yield from _expanded(below, rest or ["*"])
    elif literal:
        yield from _expanded(path, rest)
    elif _MAGIC.search(head) and os.path.isdir(folder):
        for name in fnmatch.filter(os.listdir(folder), head):
            yield from _expanded(os.path.join(folder, name), rest)


def _folders(root: str) -> list[str]:
    """Returns a folder and all folders below it that are not hidden, each of them once."""
    entered: dict[str, str] = {}
    waiting = [root]
    links: list[str] = []

    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if not os.path.isdir(folder) or os.path.realpath(folder) in entered:
            continue

        entered[os.path.realpath(folder)] = folder
        for path, is_link, is_folder in _inside(folder):
            if is_folder and not is_hidden(os.path.basename(path)):
                (links if is_link else waiting).append(path)

    return list(entered.values())


def _inside(folder: str) -> Iterator[tuple[str, bool, bool]]:
    """Yields the entries of a folder by name: path, whether it is a link, and whether it is, or leads to, a folder."""
    # Sorted, so that the order does not depend on the file system.
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        is_link = entry.is_symlink()
        yield entry.path, is_link, os.path.isdir(entry.path) if is_link else entry.is_dir()
