"""Mano (paper, 6.2 and B.2): looping adds manipulation of knowledge, at equal parameters.

    python -m experiments mano --scale cpu

Models of k layers looped T times learn modular arithmetic on expressions in prefix order
(`looplm_jax.data.tasks.Mano`). Without loops they fall far behind as expressions grow; with loops they reach the
accuracy of T times as many layers.

Published, and used at `paper`: width 1024, 128 sequences of 1,024 packed tokens, 80,000 / 110,000 / 200,000 steps for L
= 10 / 16 / 24, AdamW (0.9, 0.98), eps 1e-6, weight decay 0.1, warm-up 1,000, cosine to a tenth, the best of four
learning rates and three seeds. Not published, and so our choices: heads of width 64, the feed-forward width (8/3), and
the loss: Eq. 4 with beta 0.1, on the answer alone. One run of L = 10 takes about 1e19 operations.

`cpu`: modulus 3, L = 4, one layer of width 64, initial weights with a standard deviation of one over the square root of
the width. A cell takes about 14 minutes with four loops and 8 without, with three cells running on two cores. Accuracy
is 83.6 % with loops and 59.1 % without, over three seeds (`docs/results.md`, which also lists what was tried). `gpu`
has not been run.
"""

from types import MappingProxyType

from experiments.frame import Scale
from experiments.task_grid import Problem, ShapeExperiment, TaskGrid


def _problem(length: int, modulus: int, steps: int) -> Problem:
    """Returns the problem of expressions of one length."""
    task = f"mano:length={length},modulus={modulus}"
    return Problem(task=task, tests={f"L={length}": task}, steps=steps)


def _printed(ten: float, sixteen: float, twenty_four: float) -> dict[str, float]:
    """Returns the published accuracies in percent."""
    return {"L=10": ten, "L=16": sixteen, "L=24": twenty_four}


_PAPER = TaskGrid(
    problems={"L10": _problem(10, 23, 80_000), "L16": _problem(16, 23, 110_000), "L24": _problem(24, 23, 200_000)},
    shapes=((12, 1), (2, 1), (2, 6), (3, 1), (3, 4), (6, 1), (6, 2)),
    rates=(5e-5, 1e-4, 2e-4, 5e-4),
    seeds=3,
    settings={"width": 1024, "heads": 16, "batch_size": 128, "sequence_length": 1024, "warmup_steps": 1000},
)
_GPU = TaskGrid(
    problems={"L10": _problem(10, 23, 16_000)},
    shapes=((2, 1), (2, 6), (12, 1)),
    rates=(5e-4,),
    seeds=1,
    settings={"width": 512, "heads": 8, "batch_size": 32, "sequence_length": 1024, "warmup_steps": 500},
)
_CPU = TaskGrid(
    problems={"L4": _problem(4, 3, 8_000)},
    shapes=((1, 1), (1, 4), (4, 1)),
    rates=(3e-3,),
    seeds=3,
    settings={
        "width": 64,
        "heads": 4,
        "batch_size": 26,
        "sequence_length": 52,
        "warmup_steps": 50,
        "init_std": 0.125,
    },
)
_SMOKE = TaskGrid(
    problems={"L2": _problem(2, 5, 4)},
    shapes=((1, 1), (1, 2)),
    rates=(1e-3,),
    seeds=1,
    settings={"width": 32, "heads": 2, "batch_size": 4, "sequence_length": 64},
)

MANO = ShapeExperiment(
    name="mano",
    claim="looping adds manipulation of knowledge at equal parameters: modular arithmetic, k layers looped T times",
    title="Mano",
    grids=MappingProxyType({Scale.SMOKE: _SMOKE, Scale.CPU: _CPU, Scale.GPU: _GPU, Scale.PAPER: _PAPER}),
    printed=MappingProxyType(
        {
            "12⊗1": _printed(93.6, 94.4, 34.8),
            "2⊗1": _printed(21.5, 8.4, 7.5),
            "2⊗6": _printed(98.1, 96.3, 78.0),
            "3⊗1": _printed(75.4, 29.8, 11.0),
            "3⊗4": _printed(97.9, 95.8, 92.2),
            "6⊗1": _printed(84.7, 59.5, 20.0),
            "6⊗2": _printed(93.4, 88.5, 35.1),
        }
    ),
    pairs=(("1⊗1", "1⊗4"), ("2⊗1", "2⊗6"), ("3⊗1", "3⊗4"), ("6⊗1", "6⊗2")),
)
