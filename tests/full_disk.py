"""A disk without space, as far as this process can tell."""

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(size):
    """This process cannot write a longer file; Python ignores the signal, and gets an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
