"""Self-attention of one layer, forward and backward, with each kernel that the device supports.

Speeds are reported as a fraction of the measured speed of a matrix product.

    python -m experiments.benchmarks.attention                                   # 16 heads of 128, bfloat16
    python -m experiments.benchmarks.attention --lengths 128 --tokens 256 --heads 2    # to check that it runs

Each sequence holds documents of random lengths, 8 on average. Operations are those of a causal mask over the whole
sequence, half of `[S, S]`, in the seven matrix products of a forward pass and a backward pass that recomputes the
scores. A kernel that skips blocks between documents can exceed its fraction. Kernels take turns; times are medians.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.benchmarks.ceiling import measure_ceiling
from looplm_jax.config import AttentionKernel, ComputeConfig, Dtype
from looplm_jax.errors import UserError
from looplm_jax.models._attention_kernels import choose_kernel, self_attention
from looplm_jax.sharding import target_platform

_DOCUMENTS = 8
_PRODUCTS = 7
_OF_PLATFORM = {"gpu": (AttentionKernel.CUDNN, AttentionKernel.TRITON), "tpu": (AttentionKernel.SPLASH,)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every kernel at every length, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768], help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of all sequences (default: 32768)")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-width", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5, help="turns of each kernel (default: 5)")
    arguments = parser.parse_args(argv)

    ceiling = measure_ceiling(Dtype.BFLOAT16).flops
    print(f"{jax.devices()[0].device_kind}: {ceiling / 1e12:.3g} TFLOP/s, a bfloat16 matrix product")
    print("| tokens of a sequence | kernel | ms | TFLOP/s | of the ceiling |\n|---|---|---|---|---|")

    for length in arguments.lengths:
        sequences = max(1, arguments.tokens // length)
        inputs = _inputs(sequences, length, arguments.heads, arguments.head_width)
        operations = _PRODUCTS * sequences * arguments.heads * length**2 * arguments.head_width
        for kernel, seconds in _measure(_kernels(length, arguments.head_width), inputs, arguments.turns).items():
            rate = operations / seconds
            cells = f"{seconds * 1e3:.2f} | {rate / 1e12:.3g} | {rate / ceiling:.1%}"
            print(f"| {sequences} x {length} | {kernel.value} | {cells} |", flush=True)


def _kernels(length: int, head_width: int) -> list[AttentionKernel]:
    """Returns the kernels of this platform that support such sequences, including XLA."""
    fitting = [AttentionKernel.XLA]
    for kernel in _OF_PLATFORM.get(target_platform(), ()):
        try:
            choose_kernel(ComputeConfig(attention=kernel), length=length, head_width=head_width, dtype=jnp.bfloat16)
        except UserError:
            continue
        fitting.append(kernel)
    return fitting


def _inputs(sequences: int, length: int, heads: int, head_width: int) -> tuple[Array, ...]:
    """Returns queries, keys and values, and the positions and documents of every token."""
    random = np.random.default_rng(0)
    # [3, B, S, H, Dh]
    states = jax.random.normal(jax.random.key(0), (3, sequences, length, heads, head_width), jnp.bfloat16)
    starts = random.random((sequences, length)) < _DOCUMENTS / length
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    columns = np.broadcast_to(np.arange(length, dtype=np.int32), starts.shape)
    # Positions restart at the start of each document.
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return *states, jnp.asarray(positions), jnp.asarray(segments)


def _measure(kernels: Sequence[AttentionKernel], inputs: tuple[Array, ...], turns: int) -> dict[AttentionKernel, float]:
    """Returns the median time of each kernel in seconds."""
    runs = {kernel: functools.partial(_gradients(kernel), *inputs) for kernel in kernels}
    # The first call compiles.
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[AttentionKernel, list[float]] = {kernel: [] for kernel in kernels}
    # Kernels take turns, so that a drift of the clock speed affects all of them.
    for _ in range(turns):
        for kernel, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[kernel].append(time.perf_counter() - start)

    return {kernel: statistics.median(each) for kernel, each in seconds.items()}


def _gradients(kernel: AttentionKernel) -> Callable[..., tuple[Array, ...]]:
    """Returns the compiled gradients with respect to queries, keys and values."""

    def total(queries: Array, keys: Array, values: Array, positions: Array, segments: Array) -> Array:
        mixed = self_attention(kernel, queries, keys, values, positions, segments)
        return jnp.sum(mixed * queries, dtype=jnp.float32)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))


if __name__ == "__main__":
    main()
