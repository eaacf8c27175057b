"""Addition of n numbers (Saunshi et al., arXiv 2502.17416): loops instead of layers, at equal parameters.

    python -m experiments addition --scale cpu

Models of k layers looped T times learn to add (`looplm_jax.data.tasks.Addition`). Training mixes n = 2, 4, 8, …
numbers; each test uses one n, including 24, which training never contains.

Published, and used at `paper`: three digits, n up to 32, width 256, 8 heads, feed-forward width 1024, 200,000 steps of
1,024 problems, Adafactor at learning rate 5e-3, supervision of the last loop only, the best of three seeds. Our
choices: problems packed to 136 tokens (430 rows hold about 1,024 problems); RoPE; a warm-up and a cosine. The other
scales use AdamW.

`cpu`: two digits, n up to 4, one layer of width 64. A cell takes about 16 minutes with three loops and 7 without, with
three cells running on two cores. At n = 4, accuracy is 94.2 % with loops and 64.1 % without, over three seeds
(`docs/results.md`). `gpu` has not been run.
"""

from types import MappingProxyType

from experiments.frame import Scale
from experiments.task_grid import Problem, ShapeExperiment, TaskGrid

# (layers, loops)
_SHAPES = ((12, 1), (1, 1), (1, 12), (2, 1), (2, 6), (3, 1), (3, 4))


def _problem(longest: int, digits: int, tests: tuple[int, ...], steps: int) -> Problem:
    """Returns the problem of adding up to `longest` numbers, with one test per number of terms."""
    task = f"addition:longest={longest},digits={digits}"
    at = {f"n={terms}": f"{task},terms={terms}" for terms in tests}

    # The test with the most numbers is the task itself.
    return Problem(task=f"{task},terms={max(tests)}", tests=at, steps=steps)


def _printed(*accuracies: float) -> dict[str, float]:
    """Returns the published accuracies in percent."""
    return dict(zip(("n=8", "n=16", "n=24", "n=32"), accuracies, strict=True))


_PRINTED_SIZE = {"width": 256, "heads": 8, "mlp_width": 1024, "sequence_length": 136, "last_loop_only": True}
_PAPER = TaskGrid(
    problems={"n32": _problem(32, 3, (8, 16, 24, 32), 200_000)},
    shapes=_SHAPES,
    rates=(5e-3,),
    seeds=3,
    settings={**_PRINTED_SIZE, "batch_size": 430, "warmup_steps": 1000, "optimizer": "adafactor"},
)
_GPU = TaskGrid(
    problems={"n32": _problem(32, 3, (8, 16, 24, 32), 12_000)},
    shapes=((1, 1), (1, 12), (12, 1)),
    rates=(1e-3,),
    seeds=1,
    settings={**_PRINTED_SIZE, "batch_size": 430, "warmup_steps": 500},
)
_CPU = TaskGrid(
    problems={"n4": _problem(4, 2, (2, 3, 4), 6_000)},
    shapes=((1, 1), (1, 3), (3, 1)),
    rates=(3e-3,),
    seeds=3,
    settings={
        "width": 64,
        "heads": 4,
        "batch_size": 64,
        "sequence_length": 36,
        "warmup_steps": 50,
        # one over the square root of the width
        "init_std": 0.125,
        "last_loop_only": True,
    },
)
_SMOKE = TaskGrid(
    problems={"n2": _problem(2, 2, (2,), 4)},
    shapes=((1, 2),),
    rates=(1e-3,),
    seeds=1,
    settings={"width": 32, "heads": 2, "batch_size": 4, "sequence_length": 32, "test_items": 64},
)

ADDITION = ShapeExperiment(
    name="addition",
    claim="loops in the place of layers: adding n numbers, k layers looped T times",
    title="Addition",
    grids=MappingProxyType({Scale.SMOKE: _SMOKE, Scale.CPU: _CPU, Scale.GPU: _GPU, Scale.PAPER: _PAPER}),
    printed=MappingProxyType(
        {
            "12⊗1": _printed(100, 100, 100, 100),
            "1⊗1": _printed(0.1, 0.1, 0.1, 0.0),
            "1⊗12": _printed(99.9, 100, 99.9, 99.6),
            "2⊗1": _printed(85.8, 71.5, 49.3, 38.8),
            "2⊗6": _printed(100, 99.8, 99.7, 99.5),
            "3⊗1": _printed(97.2, 78.5, 69.2, 60.7),
            "3⊗4": _printed(100, 99.1, 97.0, 96.6),
        }
    ),
    pairs=(("1⊗1", "1⊗3"), ("1⊗1", "1⊗12"), ("2⊗1", "2⊗6"), ("3⊗1", "3⊗4")),
)
