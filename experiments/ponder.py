"""Adaptive Computation Time against fixed depth, on problems of varying difficulty (Universal Transformer, 1807.03819).

    python -m experiments ponder --scale cpu

The task is p-hop induction with p drawn from 1 to the number of hops: more hops need more loops, and the problem says
how many it has. One layer, with the norms of the published code (pre-norm, one norm at the end) and sinusoids of the
loop, is looped a fixed number of times, or as often as the halting probabilities of each token say, up to T. The gate
reads the input of the loop, and the loss is that of the mixed state plus `tau` times the mean of loops and remainder.

The published initial bias of the gate, +1, halts every token at the second loop: p_1 = 0.73, so p_1 + p_2 > 0.99.
Depth is then never used unless training finds its way back. A bias of -3 starts deep. Both are here, with several
tau.

Reported: exact match by number of hops, and the mean number of loops at the answer, also by number of hops.
Published: 2.3, 3.1 and 3.8 loops on average for bAbI's questions about one, two and three facts; a test perplexity of
LAMBADA of 142 with ACT against 202 to 319 with fixed depths.

`cpu`: one layer of width 64, up to two hops in 12 symbols, T = 6. `gpu` (not run): up to four hops in 48 symbols, T =
12. `paper` (not run): up to 8 hops in 64 symbols, width 128.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.task_grid import TaskRun
from experiments.text_models import trained
from experiments.text_variants import Results, by_variant, file_name, mean_range
from looplm_jax.config import GatePlacement, NormPlacement, Objective, Recipe, StateNorm, TimeSignal
from looplm_jax.data.tasks import make_task
from looplm_jax.evaluation import Table, figure, save_figure, task_accuracy
from looplm_jax.loading import load
from looplm_jax.models import LoopLM, Params, head_matrix, mixed_loops

# Grids

_COLLAPSING = 1.0  # the published initial bias of the gate
_DEEP = -3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halting:
    """The halting of a run: the initial bias of its gate and the weight of the ponder cost."""

    bias: float
    weight: float

    @property
    def name(self) -> str:
        """Returns its name in tables."""
        return f"ACT, bias {self.bias:+g}, tau {self.weight:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PonderGrid:
    """The runs of a scale: fixed depths and halting, for every seed. `settings` are fields of `TaskRun`."""

    hops: int
    length: int
    most: int  # loops of the runs that halt
    fixed: Sequence[int]
    halting: Sequence[Halting]
    seeds: int
    settings: Mapping[str, Any]

    def cells(self) -> tuple[Cell, ...]:
        """Returns one cell per run; the seeds are the outermost loop."""
        return tuple(cell for seed in range(self.seeds) for cell in self._cells(seed))

    def _cells(self, seed: int) -> list[Cell]:
        """Returns the cells of a seed."""
        variants: list[tuple[str, int, Halting | None]] = [(f"fixed, T={loops}", loops, None) for loops in self.fixed]
        variants += [(halting.name, self.most, halting) for halting in self.halting]
        return [
            Cell(
                name=f"{file_name(name)}-seed{seed}",
                settings={
                    "variant": name,
                    "run": dataclasses.asdict(self._run(loops, seed)),
                    "halting": None if halting is None else dataclasses.asdict(halting),
                },
            )
            for name, loops, halting in variants
        ]

    def _run(self, loops: int, seed: int) -> TaskRun:
        """Returns the run of a number of loops, whose tests are the numbers of hops."""
        return TaskRun(
            task=_task(self.hops, self.length),
            tests={str(hops): _task(hops, self.length) for hops in range(1, self.hops + 1)},
            layers=1,
            loops=loops,
            seed=seed,
            last_loop_only=True,
            **self.settings,
        )


def _task(hops: int, length: int) -> str:
    """Returns the task of a largest number of hops, which is that of its test. Token ids do not depend on it."""
    return f"phop:hops={hops},length={length},fewest=1"


_SWEEP = tuple(
    Halting(bias=bias, weight=weight)
    for weight, bias in ((0.01, _COLLAPSING), (0.01, _DEEP), (0.003, _DEEP), (0.03, _DEEP), (0.1, _DEEP))
)

GRIDS: Mapping[Scale, PonderGrid] = MappingProxyType(
    {
        Scale.SMOKE: PonderGrid(
            hops=2,
            length=12,
            most=3,
            fixed=(2,),
            halting=(Halting(bias=_COLLAPSING, weight=0.01),),
            seeds=1,
            settings={
                "width": 32,
                "heads": 2,
                "steps": 4,
                "batch_size": 4,
                "sequence_length": 28,
                "learning_rate": 1e-3,
                "test_items": 64,
            },
        ),
        Scale.CPU: PonderGrid(
            hops=2,
            length=12,
            most=6,
            fixed=(2, 6, 4),
            halting=(
                Halting(bias=_COLLAPSING, weight=0.01),
                Halting(bias=_DEEP, weight=0.01),
                Halting(bias=_DEEP, weight=0.001),
                Halting(bias=_DEEP, weight=0.1),
                Halting(bias=_COLLAPSING, weight=0.001),
            ),
            seeds=3,
            settings={
                "width": 64,
                "heads": 4,
                "steps": 1500,
                "batch_size": 64,
                "sequence_length": 28,
                "learning_rate": 3e-3,
                "warmup_steps": 50,
                "init_std": 0.1,
                "test_items": 512,
            },
        ),
        Scale.GPU: PonderGrid(
            hops=4,
            length=48,
            most=12,
            fixed=(2, 12, 4, 8),
            halting=_SWEEP,
            seeds=3,
            settings={
                "width": 128,
                "heads": 8,
                "steps": 10_000,
                "batch_size": 128,
                "sequence_length": 100,
                "learning_rate": 1e-3,
                "warmup_steps": 500,
            },
        ),
        Scale.PAPER: PonderGrid(
            hops=8,
            length=64,
            most=12,
            fixed=(2, 12, 4, 8),
            halting=_SWEEP,
            seeds=3,
            settings={
                "width": 128,
                "heads": 8,
                "mlp_width": 512,
                "steps": 200_000,
                "batch_size": 256,
                "sequence_length": 66,
                "learning_rate": 1e-3,
                "warmup_steps": 1000,
            },
        ),
    }
)


# Runs


def recipe(run: TaskRun, halting: Halting | None) -> Recipe:
    """Returns the recipe of a run: the Universal Transformer's block and, if it halts, its gate and objective."""
    base = run.recipe()
    model = dataclasses.replace(
        base.model,
        norm_placement=NormPlacement.PRE,
        state_norm=StateNorm.READOUT,
        time_signal=TimeSignal.SINUSOID,
        gate=GatePlacement.BEFORE,
        gate_bias=halting.bias if halting else 0.0,
    )
    (stage,) = base.stages
    if halting:
        stage = dataclasses.replace(stage, objective=Objective.PONDER, ponder_weight=halting.weight)
    return dataclasses.replace(base, model=model, stages=(stage,))


@functools.partial(jax.jit, static_argnames=("model", "loops"))
def answers(
    model: LoopLM, params: Params, tokens: Int[Array, "B S"], *, loops: int
) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
    """Returns whether the last token of each problem is the most probable one, and the loops run to predict it."""
    output = mixed_loops(model, {"params": params}, tokens[:, :-1], loops=loops)
    logits = output.hidden[:, -1] @ head_matrix(params, model.config)
    return jnp.argmax(logits, axis=-1) == tokens[:, -1], output.updates[:, -1]


class Ponder:
    """The experiment on Adaptive Computation Time."""

    name = "ponder"
    claim = "halting spends more loops on harder problems, and collapses to two loops with the published bias"
    scales = tuple(GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per fixed depth or halting, and seed."""
        return GRIDS[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains a model, and measures its accuracy and its loops by difficulty."""
        run = TaskRun(**cell.settings["run"])
        halting = Halting(**cell.settings["halting"]) if cell.settings["halting"] else None
        loaded = load(trained(recipe(run, halting), folder / "run", console))

        accuracy, loops = {}, {}
        for difficulty, spec in run.tests.items():
            task = make_task(spec)
            if halting is None:
                by_depth = task_accuracy(loaded.model, loaded.params, task, loops=run.loops, items=run.test_items)
                accuracy[difficulty], loops[difficulty] = float(by_depth[-1]), float(run.loops)
                continue

            tokens = np.stack([task.validation_example(item).tokens for item in range(run.test_items)])
            right, updates = answers(loaded.model, loaded.params, jnp.asarray(tokens), loops=run.loops)
            accuracy[difficulty], loops[difficulty] = float(right.mean()), float(updates.mean())

        return {
            "variant": cell.settings["variant"],
            "seed": run.seed,
            "halts": halting is not None,
            "most": run.loops,
            "accuracy": accuracy,
            "loops": loops,
        }

    def report(self, records: Sequence[Record]) -> Report:
        """Returns accuracy and loops by difficulty, one row per variant."""
        found = by_variant(records)
        return Report(
            tables=[_table(found)],
            findings=[_finding(variant, results) for variant, results in found.items() if results[0]["halts"]],
            figures={"ponder.png": functools.partial(_plot, found)},
        )


# Reporting


def _mean(result: Mapping[str, Any], name: str) -> float:
    """Returns the mean of a figure over difficulties."""
    return float(np.mean(list(result[name].values())))


def _table(found: Mapping[str, Results]) -> Table:
    """Returns one row per variant: accuracy and loops, in all and by number of hops."""
    difficulties = list(next(iter(found.values()))[0]["accuracy"])
    rows = [
        [
            variant,
            str(len(results)),
            mean_range([100 * _mean(result, "accuracy") for result in results], 1),
            *(f"{100 * np.mean([result['accuracy'][hops] for result in results]):.1f}" for hops in difficulties),
            mean_range([_mean(result, "loops") for result in results], 2),
            *(f"{np.mean([result['loops'][hops] for result in results]):.2f}" for hops in difficulties),
        ]
        for variant, results in found.items()
    ]
    columns = ["", "seeds", "exact match, %", *(f"p = {hops}" for hops in difficulties)]
    columns += ["loops at the answer", *(f"loops, p = {hops}" for hops in difficulties)]
    return Table(title="p-hop with mixed p: exact match and loops, held-out problems", columns=columns, rows=rows)


def _finding(variant: str, results: Results) -> str:
    """Returns the loops of a halting variant by difficulty."""
    loops = {hops: np.mean([result["loops"][hops] for result in results]) for hops in results[0]["loops"]}
    said = ", ".join(f"{value:.2f} at p = {hops}" for hops, value in loops.items())
    return f"{variant}: {said} of at most {results[0]['most']} loops, mean of {len(results)} seeds."


def _plot(found: Mapping[str, Results], path: Path) -> None:
    """Plots accuracy against mean loops, one point per run, and mean loops by difficulty."""
    made, (left, right) = figure(columns=2)
    for number, (variant, results) in enumerate(found.items()):
        loops, accuracy = ([_mean(result, name) for result in results] for name in ("loops", "accuracy"))
        marker = "o" if results[0]["halts"] else "s"
        left.plot(loops, [100 * value for value in accuracy], marker, color=f"C{number}", label=variant)
        if results[0]["halts"]:
            means = {hops: np.mean([result["loops"][hops] for result in results]) for hops in results[0]["loops"]}
            right.plot(list(means), list(means.values()), marker="o", color=f"C{number}")

    left.set(xlabel="loops at the answer", ylabel="exact match (%)", ylim=(0, 101))
    left.legend(frameon=False, fontsize="small")
    right.set(xlabel="hops", ylabel="loops at the answer", ylim=(0, None))
    save_figure(made, path)


PONDER = Ponder()
