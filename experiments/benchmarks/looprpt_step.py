"""Time and memory of a LoopRPT step against a Stage I step at the same shape, for 2, 4 and 8 rollouts.

    python -m experiments.benchmarks.looprpt_step

Width 256, feed-forward width 704, 4 layers, 4 loops, 8,192 tokens in the vocabulary, a sequence of 128. By count of
forward passes, a Stage I step takes three: one forward, two backward. A LoopRPT step takes one for the teacher, three
for the student, and four for each rollout, because the backward pass computes it again. Memory is the sum of temporary
arrays according to the compiler. The ratios of time are medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax

from experiments.benchmarks.batches import random_batch
from looplm_jax.config import ComputeConfig, LoopRPTConfig, MeshConfig, Objective, Recipe, Remat, Stage
from looplm_jax.models import LoopLM, presets
from looplm_jax.planning._budget import ProgramBytes
from looplm_jax.sharding import make_mesh
from looplm_jax.training._compile import compiled_step, to_device
from looplm_jax.training._state import initial_state

_BATCH, _LENGTH, _LOOPS, _NEVER = 1, 128, 4, 10**6
_ROLLOUTS = (2, 4, 8)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each, after one that is not")
    rounds = parser.parse_args(argv).rounds

    plain, _ = _step(Objective.EXPECTED_LOSS, 2)
    steps, memory = {}, {}
    for rollouts in _ROLLOUTS:
        steps[rollouts], memory[rollouts] = _step(Objective.LOOPRPT, rollouts)

    # An uncounted step of each.
    for step in (plain, *steps.values()):
        step()

    ratios: dict[int, list[float]] = {rollouts: [] for rollouts in _ROLLOUTS}
    base: list[float] = []
    for _ in range(rounds):
        base.append(plain())
        for rollouts, step in steps.items():
            ratios[rollouts].append(step() / base[-1])

    print(f"Stage I        {statistics.median(base):6.3f} s a step")
    for rollouts in _ROLLOUTS:
        measured, counted = statistics.median(ratios[rollouts]), (4 + 4 * rollouts) / 3
        took = f"{measured:5.2f} steps of Stage I, {counted:5.2f} by count ({measured / counted:.2f})"
        held = f"{memory[rollouts] / 2**20:6.1f} MiB ({memory[rollouts] / memory[_ROLLOUTS[0]]:.2f} of {_ROLLOUTS[0]})"
        print(f"{rollouts} rollouts  {took}  {held}")


def _step(objective: Objective, rollouts: int) -> tuple[Callable[[], float], int]:
    """Returns a function that runs a step and returns its seconds, and the bytes of its temporary arrays."""
    stage = Stage(
        name="bench",
        objective=objective,
        steps=_NEVER - 1,
        batch_size=_BATCH,
        sequence_length=_LENGTH,
        loops=_LOOPS,
        learning_rate=1e-6,
        looprpt=LoopRPTConfig(rollouts=rollouts),
    )
    recipe = Recipe(
        name="bench", model=presets.small(), stages=(stage,), compute=ComputeConfig(remat=Remat.NONE), log_every=1
    )
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = LoopLM(recipe.model, recipe.compute)

    program = compiled_step(recipe, model, stage, mesh, 0, _LOOPS)
    state = initial_state(recipe, model, stage, mesh)
    batch = to_device(random_batch(recipe.model.vocab_size, sequences=_BATCH, length=_LENGTH), stage, mesh)

    def step() -> float:
        nonlocal state
        started = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - started

    return step, ProgramBytes.of(program).temporaries


if __name__ == "__main__":
    main()
