"""p-hop induction (Saunshi et al., arXiv 2502.17416): loops instead of layers, at equal parameters.

    python -m experiments p-hop --scale cpu

Models of k layers looped T times learn to follow p hops through a sequence of symbols (`looplm_jax.data.tasks.PHop`).
Sequences are built around a chain of hops, so none is degenerate. A second test draws symbols independently; a quarter
of those sequences end in two equal symbols and can be answered by one induction head. Both kinds are reported.

Published, and used at `paper`: alphabet 4, n = 256, p = 16 and 32, width 128, 8 heads, feed-forward width 512, RoPE,
200,000 steps of 256 sequences, Adafactor at learning rate 1e-3, supervision of the last loop only. Our choices: three
seeds, a warm-up and a cosine. The other scales use AdamW.

`cpu`: Eq. 4 with beta 0.1, n = 16, p = 2, one layer of width 64, and a curriculum: half of the training problems ask
for one hop (`fewest`). With p = 3 and n = 24, in a first attempt, two hops were not learned in 1,000 steps.
"""

from types import MappingProxyType

from experiments.frame import Scale
from experiments.task_grid import Problem, ShapeExperiment, TaskGrid

_SHAPES = ((6, 1), (1, 1), (1, 6), (2, 1), (2, 3), (3, 1), (3, 2))


def _problem(hops: int, length: int, steps: int, more: str = "") -> Problem:
    """Returns the problem of a number of hops, with tests on both kinds of sequences."""
    task = f"phop:hops={hops},length={length}{more}"
    tests = {f"p={hops}": task, f"p={hops}, independent symbols": f"{task},sequences=uniform"}
    return Problem(task=task, tests=tests, steps=steps)


def _printed(sixteen: float, thirty_two: float) -> dict[str, float]:
    """Returns the published accuracies in percent."""
    return {"p=16": sixteen, "p=32": thirty_two}


_PRINTED_SIZE = {
    "width": 128,
    "heads": 8,
    "mlp_width": 512,
    "sequence_length": 264,
    "batch_size": 256,
    "last_loop_only": True,
}
_PAPER = TaskGrid(
    problems={"p16": _problem(16, 256, 200_000), "p32": _problem(32, 256, 200_000)},
    shapes=_SHAPES,
    rates=(1e-3,),
    seeds=3,
    settings={**_PRINTED_SIZE, "warmup_steps": 1000, "optimizer": "adafactor"},
)
_GPU = TaskGrid(
    problems={"p16": _problem(16, 256, 12_000)},
    shapes=((1, 1), (1, 6), (6, 1)),
    rates=(1e-3,),
    seeds=1,
    settings={**_PRINTED_SIZE, "warmup_steps": 500},
)
_CPU = TaskGrid(
    problems={"p2": _problem(2, 16, 3000, ",fewest=1")},
    shapes=((1, 1), (1, 3), (3, 1)),
    rates=(3e-3,),
    seeds=3,
    settings={
        "width": 64,
        "heads": 4,
        "batch_size": 64,
        "sequence_length": 36,
        "warmup_steps": 50,
        "init_std": 0.1,
    },
)
_SMOKE = TaskGrid(
    problems={"p2": _problem(2, 12, 4)},
    shapes=((1, 2),),
    rates=(1e-3,),
    seeds=1,
    settings={"width": 32, "heads": 2, "batch_size": 4, "sequence_length": 32, "test_items": 64},
)

P_HOP = ShapeExperiment(
    name="p-hop",
    claim="loops in the place of layers: p-hop induction, k layers looped T times",
    title="p-hop induction",
    grids=MappingProxyType({Scale.SMOKE: _SMOKE, Scale.CPU: _CPU, Scale.GPU: _GPU, Scale.PAPER: _PAPER}),
    printed=MappingProxyType(
        {
            "6⊗1": _printed(99.9, 99.6),
            "1⊗1": _printed(48.9, 49.0),
            "1⊗6": _printed(99.9, 99.5),
            "2⊗1": _printed(68.8, 59.4),
            "2⊗3": _printed(99.9, 99.8),
            "3⊗1": _printed(97.2, 73.0),
            "3⊗2": _printed(99.9, 99.5),
        }
    ),
    pairs=(("1⊗1", "1⊗3"), ("1⊗1", "1⊗6"), ("2⊗1", "2⊗3"), ("3⊗1", "3⊗2")),
)
