"""A disk without space, as far as this process can tell."""

import contextlib
import resource

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def files_of_at_most(size):
    """This process cannot write a longer file; Python ignores the signal, and gets an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _nothing_compiled_is_kept():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _nothing_compiled_is_kept():
    """A compiled program that is cut short would be read by every other process of the tests."""
    folder = jax.config.jax_compilation_cache_dir
    _keep_programs_in(None)
    try:
        yield
    finally:
        _keep_programs_in(folder)


def _keep_programs_in(folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
