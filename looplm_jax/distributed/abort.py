"""The JAX runtime aborts a process that misses process 0: here with one last line, and a status that means "again"."""

import ctypes
import signal

from looplm_jax.distributed.cluster import end_process


def on_abort(message: str, status: int) -> None:
    """From now on, where the C library's `abort` is called, the process ends with this line and status instead.

    Python's own signal handlers run in the main thread between two instructions; whoever aborts does not wait so long.
    """

    def handle(number: int) -> None:
        del number
        end_process(message, status)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handler))  # the C library keeps no reference
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), handler)
