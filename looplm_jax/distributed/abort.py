"""Turns an abort of the JAX runtime into one line on standard error and an exit status that means "try again".

The JAX runtime calls the C library's `abort` when it loses the connection to process 0.
"""

import ctypes
import signal

from looplm_jax.distributed.cluster import end_process


def on_abort(message: str, status: int) -> None:
    """Installs a handler of SIGABRT that ends the process with `message` and `status`.

    A Python signal handler would not do: it runs in the main thread between two bytecode instructions, and `abort` does
    not wait for it.
    """

    def handle(number: int) -> None:
        del number
        end_process(message, status)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handler))  # the C library keeps no reference
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), handler)
