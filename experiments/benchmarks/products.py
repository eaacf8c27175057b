"""Measures the matrix products of a train step one by one, in XLA and in PyTorch, as a ceiling for the whole step.

    python -m experiments.benchmarks.products
    python -m experiments.benchmarks.products --width 512 --layers 8

Each product runs alone at the shape, the layout and the dtype (float32) that the step of `train_step` uses. The two
libraries take turns. Times are CPU times of all threads, which other work on the machine changes less than the time
that passes. The last lines multiply the median time of each product by the number of times that one step computes it:
a step cannot use less CPU time than the sum, whatever else it does.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.train_step import BATCH, LENGTH, LOOPS, shape
from looplm_jax.config import ModelConfig

# For each operand of a two-dimensional product, the axis that is summed over.
_FORWARD, _INPUT_GRADIENT, _KERNEL_GRADIENT = (1, 0), (1, 1), (0, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A product that one step computes `count` times, over leading axes of `batch` independent products."""

    name: str
    left: tuple[int, int]
    right: tuple[int, int]
    summed: tuple[int, int]
    count: int
    batch: int = 1

    @property
    def flops(self) -> int:
        """Floating-point operations of one call, a multiplication and an addition each."""
        kept = self.left[1 - self.summed[0]] * self.right[1 - self.summed[1]]
        return 2 * self.batch * kept * self.left[self.summed[0]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Median CPU time of one call of a product in each library, in seconds."""

    product: Product
    xla: float
    torch: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all products and prints a table and the two sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each product in each library (default: 9)")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads of PyTorch leave the cores to XLA

    products = step_products(shape(arguments.width, arguments.layers))
    print("GFLOP per second of CPU time:")
    print("| product | shape | times a step | XLA | PyTorch |\n|---|---|---|---|---|")
    timings = []
    for product in products:
        timing = _measure(product, arguments.rounds)
        timings.append(timing)
        rates = " | ".join(f"{product.flops / seconds / 1e9:.1f}" for seconds in (timing.xla, timing.torch))
        print(f"| {product.name} | {_shape(product)} | {product.count} | {rates} |", flush=True)

    xla = sum(timing.xla * timing.product.count for timing in timings)
    torch = sum(timing.torch * timing.product.count for timing in timings)
    flops = sum(product.flops * product.count for product in products)
    print(f"all products of a step, {flops / 1e9:.0f} GFLOP: {xla:.2f} s of CPU time in XLA, {torch:.2f} s in PyTorch")
    print(f"XLA computes them in {xla / torch:.2f}x the CPU time of PyTorch")


def step_products(config: ModelConfig) -> list[Product]:
    """Returns the products of one step of Eq. 4 without recomputation: forward pass and both gradients."""
    tokens, passes = BATCH * LENGTH, config.num_layers * LOOPS
    heads, width = config.num_heads, config.width
    inner = heads * config.head_width
    projections = [
        ("query, key, value", width, inner, 3 * passes),
        ("attention output", inner, width, passes),
        ("gate, up", width, config.mlp_width, 2 * passes),
        ("down", config.mlp_width, width, passes),
        ("head", width, config.vocab_size, LOOPS),
    ]
    products = []
    for name, inputs, outputs, count in projections:
        states, kernel, cotangents = (tokens, inputs), (inputs, outputs), (tokens, outputs)
        products += [
            Product(name=name, left=states, right=kernel, summed=_FORWARD, count=count),
            Product(name=f"{name}: inputs", left=cotangents, right=kernel, summed=_INPUT_GRADIENT, count=count),
            Product(name=f"{name}: kernel", left=states, right=cotangents, summed=_KERNEL_GRADIENT, count=count),
        ]

    # Attention has two products in the forward pass and four in the backward pass, all of the same size.
    sequence = (LENGTH, config.head_width)
    products += [
        Product(
            name="attention scores",
            left=sequence,
            right=sequence,
            summed=_INPUT_GRADIENT,
            count=2 * passes,
            batch=BATCH * heads,
        ),
        Product(
            name="attention values",
            left=(LENGTH, LENGTH),
            right=sequence,
            summed=_FORWARD,
            count=2 * passes,
            batch=BATCH * heads,
        ),
        Product(
            name="attention: keys, values",
            left=(LENGTH, LENGTH),
            right=sequence,
            summed=_KERNEL_GRADIENT,
            count=2 * passes,
            batch=BATCH * heads,
        ),
    ]
    return products


def _measure(product: Product, rounds: int) -> Timing:
    sides = _xla(product), _torch(product)
    for run in sides * 2:
        run()

    seconds = [[_seconds(run) for run in sides] for _ in range(rounds)]
    xla, torch = (statistics.median(side) for side in zip(*seconds, strict=True))
    return Timing(product=product, xla=xla, torch=torch)


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _xla(product: Product) -> Callable[[], object]:
    batch = tuple(range(product.batch > 1))
    summed = (len(batch) + product.summed[0],), (len(batch) + product.summed[1],)
    left, right = (jnp.asarray(operand) for operand in _operands(product))
    multiply = jax.jit(lambda x, y: jax.lax.dot_general(x, y, (summed, (batch, batch))))
    return lambda: multiply(left, right).block_until_ready()


def _torch(product: Product) -> Callable[[], object]:
    import torch

    left, right = (torch.from_numpy(operand) for operand in _operands(product))
    if product.summed[0] == 0:
        left = left.transpose(-1, -2)
    if product.summed[1] == 1:
        right = right.transpose(-1, -2)
    return lambda: torch.matmul(left, right)


def _operands(product: Product) -> list[np.ndarray]:
    leading = (product.batch,) if product.batch > 1 else ()
    generator = np.random.default_rng(0)
    return [generator.standard_normal(leading + size, np.float32) for size in (product.left, product.right)]


def _shape(product: Product) -> str:
    kept, summed = product.left[1 - product.summed[0]], product.left[product.summed[0]]
    size = f"{kept} x {summed} x {product.right[1 - product.summed[1]]}"
    return f"{product.batch} of {size}" if product.batch > 1 else size


if __name__ == "__main__":
    main()
