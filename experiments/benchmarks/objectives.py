"""Seconds of a train step with the loss after the last loop against Eq. 4, at the same shape, alternating in one run.

    python -m experiments.benchmarks.objectives

Width 256, feed-forward width 704, 4 layers, 4 loops, 8,192 tokens in the vocabulary, 8 sequences of 256. A step whose
metrics are logged also computes the losses of the earlier loops, so both kinds of step are measured. The ratios are
medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax

from experiments.benchmarks.batches import random_batch
from looplm_jax.config import MeshConfig, Objective, Recipe, Stage
from looplm_jax.models import LoopLM, presets
from looplm_jax.sharding import make_mesh
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._state import initial_state

_BATCH, _LENGTH, _LOOPS, _NEVER = 8, 256, 4, 10**6


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted steps of each, after two that are not")
    rounds = parser.parse_args(argv).rounds

    steps = {
        "Eq. 4": _step(Objective.EXPECTED_LOSS, log_every=1),
        "last loop": _step(Objective.LAST_LOSS, log_every=_NEVER),
        "last loop, logged": _step(Objective.LAST_LOSS, log_every=1),
    }
    # Two uncounted steps of each kind, which include compilation.
    for step in [*steps.values()] * 2:
        step()

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())

    for name, measured in seconds.items():
        ratio = statistics.median(one / of for one, of in zip(measured, seconds["Eq. 4"], strict=True))
        print(f"{name:18} {statistics.median(measured):6.3f} s a step  {ratio:5.2f} of Eq. 4")


def _step(objective: Objective, *, log_every: int) -> Callable[[], float]:
    """Returns a function that runs a step and returns its seconds."""
    stage = Stage(
        name="bench", objective=objective, steps=_NEVER - 1, batch_size=_BATCH, sequence_length=_LENGTH, loops=_LOOPS
    )
    recipe = Recipe(name="bench", model=presets.small(), stages=(stage,), log_every=log_every)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = LoopLM(recipe.model, recipe.compute)

    programs = StagePrograms(recipe, model, stage, mesh, first_step=0)
    programs.compile(_LOOPS)
    state = initial_state(recipe, model, stage, mesh)
    batch = to_device(random_batch(recipe.model.vocab_size, sequences=_BATCH, length=_LENGTH), stage, mesh)

    def step() -> float:
        nonlocal state
        started = time.perf_counter()
        state, metrics = programs.run(_LOOPS, state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - started

    return step


if __name__ == "__main__":
    main()
