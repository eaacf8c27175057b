"""The persistent compilation cache: a program that one command compiled is reused by the next.

This is JAX's own cache, in `~/.cache/looplm_jax` (or `$XDG_CACHE_HOME/looplm_jax`) unless the environment names another
folder. If the cache is unusable, commands are slower but otherwise work the same.
"""

import contextlib
import glob
import os
import re
import stat
import sys
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from looplm_jax.terminal import print_error

OFF = "--no-compilation-cache"
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_SETTINGS = {
    _FOLDER: "",
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),  # bytes; least recently used entries are evicted
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # a command runs many small programs
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
}
_WRITING_SECONDS = 60.0  # an entry without its access time is being written, or is incomplete if it is older
_PROBLEM = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': ")


def keep_compiled_programs(environment: MutableMapping[str, str] = os.environ) -> None:
    """Enables the cache for this process and its subprocesses. Must be called before JAX is imported.

    Settings that the user made in the environment are kept. If the cache cannot be used and the user can fix it, the
    reason is printed in one line.
    """
    # JAX reads these variables when it is imported. A folder chosen by the user is used as it is.
    if "jax" in sys.modules or _FOLDER in environment:
        return
    if _off(environment):
        return

    folder = _default_folder(environment)
    if folder is None:
        return

    try:
        # Only the owner may write: cached programs are executed.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _problem(folder)
        if problem is None:
            _remove_cut_short(folder)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        print_error(f"note: compiled programs are not kept: {folder}: {problem}; {OFF} leaves this note out")
        return

    for name, value in _SETTINGS.items():
        environment.setdefault(name, value)
    environment[_FOLDER] = str(folder)
    warnings.showwarning = _without_the_cache(folder, warnings.showwarning)
    # Every damaged entry has to reach showwarning, whatever other filters are set.
    warnings.filterwarnings("always", message=_PROBLEM.pattern)


def traced_programs(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Returns the folder for traced programs, beside the compiled ones, or None if those are not kept on a disk."""
    folder = environment.get(_FOLDER, "")
    return None if _off(environment) or "://" in folder or not folder else Path(folder) / "traced"


def _off(environment: Mapping[str, str]) -> bool:
    """Returns whether the user disabled JAX's cache."""
    return environment.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in ("0", "false")


def _default_folder(environment: MutableMapping[str, str]) -> Path | None:
    """Returns the default folder, or None if the user has no home directory."""
    # The XDG specification says to ignore relative paths.
    base = environment.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "looplm_jax"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "looplm_jax" if os.path.isabs(home) else None


def _problem(folder: Path) -> str | None:
    """Returns the reason not to use the folder, or None.

    Programs in the folder are executed, so no other user may write to it.
    """
    found = folder.stat()

    if found.st_uid != os.geteuid():
        return "it belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users may write to it; `chmod go-w {folder}`"
    return None if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else "it cannot be written"


def _remove_cut_short(folder: Path) -> None:
    """Removes incomplete entries of killed processes, which would prevent JAX from evicting entries."""
    for entry in folder.glob("*-cache"):
        used = entry.with_name(f"{entry.name.removesuffix('-cache')}-atime")
        with contextlib.suppress(FileNotFoundError):  # another process evicted it
            if not used.exists() and time.time() - entry.stat().st_mtime > _WRITING_SECONDS:
                entry.unlink()


def _without_the_cache(folder: Path, show: Callable[..., None]) -> Callable[..., None]:
    """Returns a `warnings.showwarning` that removes damaged entries, and reports a failed write only once."""
    said = False

    def shown(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        nonlocal said
        found = _PROBLEM.match(str(message))
        if found is None:
            show(message, category, *where, **options)
        elif found[1] == "reading":
            _remove(folder, found[2])  # the program is compiled now, and its entry written again
        elif not said:
            said = True
            print_error(f"note: compiled programs are not kept: {str(message)[found.end() :]}")

    return shown


def _remove(folder: Path, program: str) -> None:
    """Removes all entries of a program."""
    for path in folder.glob(f"{glob.escape(program)}-*"):
        with contextlib.suppress(OSError):
            path.unlink()
