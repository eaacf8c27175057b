"""Compiles programs for devices that need not be attached, and reads the errors of the compiler."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator

import jax

from looplm_jax.errors import UserError, brief

# With these variables the TPU compiler queries no metadata server, assumes some kind of host (which does not
# change programs), and allows other processes to load it at the same time.
_OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotCompile(UserError):
    """The compiler failed on a program, for another reason than a lack of memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """The bytes that a program would need, including its arguments, and the bytes of the device."""

    used: int
    limit: int


def compile_program(
    lower: Callable[[], jax.stages.Lowered], what: str, change: str
) -> jax.stages.Compiled | OutOfMemory:
    """Returns a compiled program, or the memory that it would need if it does not fit.

    Args:
      lower: returns the program, lowered for its devices.
      what: what is compiled, for messages.
      change: what the user can change if the compiler fails.

    Raises:
      DoesNotCompile: the compiler failed for another reason.
    """
    with without_network():
        try:
            return lower().compile()
        except jax.errors.JaxRuntimeError as error:
            refused = out_of_memory(str(error))
            if refused is None:
                raise DoesNotCompile(f"{what} does not compile; {change} ({brief(error)})") from error
            return refused


def out_of_memory(error: str) -> OutOfMemory | None:
    """Returns the sizes in the compiler's out-of-memory error, or None for other errors.

    The temporaries in the text of the error include the arguments.
    """
    found = _USED.search(error) or _TEMPORARIES.search(error)
    if found is None:
        return None
    used, limit = (int(float(found[at]) * _UNITS[found[at + 1].upper()]) for at in (1, 3))
    return OutOfMemory(used=used, limit=limit)


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """A context manager in which the TPU compiler does not access the network."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update({name: value for name, value in _OFFLINE.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
