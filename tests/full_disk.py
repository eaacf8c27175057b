"""Simulates a full disk for this process."""

import contextlib
import resource

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def files_of_at_most(size):
    """Limits the file size of this process; Python ignores the signal and gets an error instead."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _nothing_compiled_is_kept():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _nothing_compiled_is_kept():
    """Turns off the compilation cache: every other test process would read a truncated entry."""
    folder = jax.config.jax_compilation_cache_dir
    _keep_programs_in(None)
    try:
        yield
    finally:
        _keep_programs_in(folder)


def _keep_programs_in(folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
