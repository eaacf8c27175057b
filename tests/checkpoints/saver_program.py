"""Saves one step after another until it is killed: `python saver_program.py FOLDER [BYTES_PER_FILE]`.

As a program, it resumes after the latest valid step and prints each step when its save begins, the first one when it
is committed. As a module, it provides the expected state of a step.
"""

import resource
import signal
import sys

import jax
import jax.numpy as jnp

from looplm_jax.checkpoints import CheckpointStore, Metadata
from looplm_jax.errors import UserError


@jax.jit
def state_of(step):
    """Returns a state of 4 MB that is a function of the step."""
    return {"w": jax.random.normal(jax.random.key(step), (1000, 1000)), "step": step}


def metadata_of(step):
    return Metadata(
        config={},
        tokenizer_kind="none",
        tokenizer=b"tokens",
        tokenizer_fingerprint="f",
        data_state={"step": step},
    )


def abstract_state():
    return jax.eval_shape(state_of, jnp.int32(0))


def main(folder):
    store = CheckpointStore(folder, keep=2)
    step = store.restore(abstract_state()).step if store.steps() else 0
    while True:
        step += 1
        store.save(step, state_of(jnp.int32(step)), metadata_of(step))
        if step == 1:
            store.wait()
        print(step, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    try:
        main(sys.argv[1])
    except UserError as error:
        sys.exit(str(error))
