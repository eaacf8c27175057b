"""Compile time and program size of the train step against depth: neither grows with layers or loops.

    python -m experiments.benchmarks.compile_time

Compiles the complete train step (width 256, 8,192 tokens in the vocabulary, 8 sequences of 256) at 2 layers x 2 loops
and at 24 x 8, alternating, and prints medians and their ratio.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax

from looplm_jax.config import ComputeConfig, MeshConfig, Recipe, Stage
from looplm_jax.models import LoopLM, presets
from looplm_jax.sharding import make_mesh
from looplm_jax.training._compile import lower_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Seconds of one compilation, and the size of the program."""

    seconds: float
    instructions: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args(argv).repeats

    compile_step(2, 2)  # the first compilation of a process includes one-time costs
    pairs = [(compile_step(2, 2), compile_step(24, 8)) for _ in range(repeats)]

    for name, index in (("2 layers x 2 loops", 0), ("24 layers x 8 loops", 1)):
        seconds = statistics.median(pair[index].seconds for pair in pairs)
        print(f"{name:20} {seconds:6.2f} s  {pairs[0][index].instructions} instructions")

    ratio = statistics.median(deep.seconds / shallow.seconds for shallow, deep in pairs)
    print(f"ratio, median of {repeats} pairs: {ratio:.2f}x")


def compile_step(layers: int, loops: int) -> Compiled:
    """Traces and compiles a train step without cached programs."""
    jax.clear_caches()
    config = dataclasses.replace(presets.small(), num_layers=layers, loops=loops)
    stage = Stage(name="bench", steps=1, batch_size=8, sequence_length=256, loops=loops)
    recipe = Recipe(name="bench", model=config, stages=(stage,))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])

    start = time.perf_counter()
    compiled = lower_step(recipe, LoopLM(config, ComputeConfig()), stage, mesh, first_step=0, loops=loops).compile()
    seconds = time.perf_counter() - start
    # Each instruction of the HLO text is an assignment.
    return Compiled(seconds=seconds, instructions=(compiled.as_text() or "").count(" = "))


if __name__ == "__main__":
    main()
