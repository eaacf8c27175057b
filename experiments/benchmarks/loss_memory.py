"""Peak memory of the loss over all loops: chunked against naive, as reported by the compiler.

    python -m experiments.benchmarks.loss_memory

Compiles (without running) value and gradients of Eq. 4 from hidden states, 4 loops, 8 sequences of 1,024, width 512,
49,152 tokens in the vocabulary, and prints the bytes of temporaries. The naive form holds the logits of all loops.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from looplm_jax.losses import stage1, stage1_from_hidden, token_losses

_LOOPS, _BATCH, _LENGTH, _WIDTH, _VOCABULARY = 4, 8, 1024, 512, 49152


def main() -> None:
    """Compiles every form and prints the table."""
    naive = temporary_bytes(_naive)
    print(f"{'form':34} {'temporaries':>14} {'of naive':>9}")
    for name, loss in _forms().items():
        used = temporary_bytes(loss)
        print(f"{name:34} {used / 2**20:10.0f} MiB {used / naive:9.3f}")


def temporary_bytes(loss: Callable[..., Array]) -> int:
    """Returns the bytes of temporaries for value and gradients with respect to hidden states, head and gates."""
    hidden = jax.ShapeDtypeStruct((_LOOPS, _BATCH, _LENGTH, _WIDTH), jnp.float32)
    head = jax.ShapeDtypeStruct((_WIDTH, _VOCABULARY), jnp.float32)
    gates = jax.ShapeDtypeStruct((_LOOPS, _BATCH, _LENGTH), jnp.float32)
    targets = jax.ShapeDtypeStruct((_BATCH, _LENGTH), jnp.int32)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(hidden, head, gates, targets).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend does not say how much memory a program takes")
    return analysis.temp_size_in_bytes


def _naive(hidden: Array, head: Array, gates: Array, targets: Array) -> Array:
    """Returns the loss from the logits of all loops at once."""
    logits = hidden @ head
    at_target = jnp.take_along_axis(logits, jnp.broadcast_to(targets, gates.shape)[..., None], axis=-1)[..., 0]
    return stage1(jax.nn.logsumexp(logits, axis=-1) - at_target, gates, beta=0.05)[0]


def _forms() -> dict[str, Callable[..., Array]]:
    """Returns the forms of the loss: naive, recomputed in chunks, and fused with its gradients in chunks."""

    def rematted(chunk: int) -> Callable[..., Array]:
        return lambda h, w, g, y: stage1(token_losses(h, w, y, chunk=chunk), g, beta=0.05)[0]

    def fused(chunk: int) -> Callable[..., Array]:
        return lambda h, w, g, y: stage1_from_hidden(h, w, y, g, beta=0.05, chunk=chunk)[0]

    return {
        "naive": _naive,
        "token_losses, chunk 128": rematted(128),
        "stage1_from_hidden, chunk 128": fused(128),
        "stage1_from_hidden, chunk 32": fused(32),
    }


if __name__ == "__main__":
    main()
