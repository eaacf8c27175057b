"""Deep equilibrium models: memory, gradients and training of a loop at its fixed point (1909.01377, 2106.14342).

    python -m experiments equilibrium --scale cpu

A loop that contracts has a fixed point, whose gradient needs the memory of one loop: that of a linear system, which is
solved by products with the transposed Jacobian (`models.implicit`). Cheaper gradients pass through k loops from the
fixed point (`models.phantom`; k = 1 is the one-step gradient). The block is Ouro's with the normalized input added in
every loop, which contracts at its initial weights; without the norm it does not.

`memory`: temporaries that the compiler allocates for loss and gradient at several numbers of loops. `gradients`:
relative error and cosine against the gradient through many unrolled loops, by the tolerance of both solvers and by k.
Training: the loss of the last of T = 12 loops, with gradients through all, the last four, or only the last loop; and
the loss at the fixed point with the implicit gradient, with and without a penalty on the Jacobian. The programs of
`memory` and `gradients` use the functions above directly, so they show what holds for any loop.

Published: 88 % less memory than a Transformer of the same quality; WikiText-103 perplexity 23.78 with implicit
gradients, 23.67 with a Jacobian penalty, and 22.34 with twelve unrolled loops.

`cpu`: one layer of width 64; 8 x 64 tokens; 240 steps. `gpu` (not run): the model of `demo`. `paper` (not run):
`text-small`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.optimizers import at_equal_time, final_loss, run_seconds
from experiments.text_variants import (
    ALIKE,
    SMALL,
    TINY,
    Changes,
    Results,
    VariantGrid,
    always,
    best_rate,
    by_variant,
    mean_range,
    train_variant,
)
from looplm_jax.config import ComputeConfig, Injection, ModelConfig, Remat, Solver, SolverKind
from looplm_jax.evaluation import Table, figure, save_figure
from looplm_jax.losses import token_losses
from looplm_jax.models import LoopLM, Params, fixed_point, head_matrix, implicit, init_params, phantom

# Grids


_BLOCK: Changes = {"model.injection": "add", "model.injection_norm": True}


def _truncated(loops: int) -> Callable[[int], Changes]:
    """Returns the changes of a stage with gradients through the last loops only."""
    return always({"stages.pretrain.backprop_loops": loops})


_TRAINING: Changes = {**_BLOCK, "stages.pretrain.objective": "last_loss", "stages.pretrain.read_out": "last"}
_IMPLICIT: Changes = {
    "stages.pretrain.gradient": "implicit",
    "stages.pretrain.solver.tolerance": 1e-2,
    "stages.pretrain.solver.max_loops": 24,
}
# The published weight and share of steps.
_PENALIZED: Changes = {
    **_IMPLICIT,
    "stages.pretrain.jacobian.weight": 0.1,
    "stages.pretrain.jacobian.share_of_steps": 0.4,
}
_GRADIENTS = {
    "unrolled": always({}),
    "implicit": always(_IMPLICIT),
    "phantom, k=4": _truncated(4),
    "one step": _truncated(1),
    "implicit, Jacobian penalty": always(_PENALIZED),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model and the batch of the cells without training."""

    width: int
    mlp_width: int
    heads: int
    vocab_size: int
    batch: int
    length: int
    loops: Sequence[int]  # whose memory is compared
    unrolled: int  # loops of the reference gradient
    seeds: int

    def model(self) -> LoopLM:
        """Returns the model."""
        config = ModelConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            mlp_width=self.mlp_width,
            num_layers=1,
            num_heads=self.heads,
            rope_theta=1e4,
            injection=Injection.ADD,
            injection_norm=True,
        )
        return LoopLM(config, ComputeConfig(remat=Remat.NONE))

    def cells(self) -> tuple[Cell, ...]:
        """Returns the cells of memory and gradients."""
        settings = dataclasses.asdict(self)
        gradients = (
            Cell(name=f"gradients-seed{seed}", settings={"part": _GRADIENT, "sizes": settings, "seed": seed})
            for seed in range(self.seeds)
        )
        return (Cell(name=_MEMORY, settings={"part": _MEMORY, "sizes": settings}), *gradients)


_MEMORY, _GRADIENT, _TRAIN = "memory", "gradients", "training"

SIZES: Mapping[Scale, Sizes] = MappingProxyType(
    {
        Scale.SMOKE: Sizes(
            width=16,
            mlp_width=32,
            heads=2,
            vocab_size=32,
            batch=2,
            length=8,
            loops=(2, 8),
            unrolled=20,
            seeds=1,
        ),
        Scale.CPU: Sizes(
            width=64,
            mlp_width=176,
            heads=4,
            vocab_size=512,
            batch=8,
            length=64,
            loops=(4, 16, 64),
            unrolled=80,
            seeds=3,
        ),
        Scale.GPU: Sizes(
            width=192,
            mlp_width=512,
            heads=4,
            vocab_size=2048,
            batch=32,
            length=128,
            loops=(4, 8, 16, 32, 64),
            unrolled=400,
            seeds=3,
        ),
        Scale.PAPER: Sizes(
            width=1024,
            mlp_width=2816,
            heads=16,
            vocab_size=49152,
            batch=16,
            length=1024,
            loops=(4, 8, 16, 32, 64),
            unrolled=400,
            seeds=3,
        ),
    }
)

GRIDS: Mapping[Scale, VariantGrid] = MappingProxyType(
    {
        Scale.SMOKE: VariantGrid(
            recipe="demo",
            changes={**TINY, **_TRAINING},
            variants={name: _GRADIENTS[name] for name in ("implicit", "one step")},
            loops=(3,),
            rates=(3e-3,),
            seeds=1,
            held_out={"sequences": 8, "sequence_length": 64, "batch_size": 8},
        ),
        Scale.CPU: VariantGrid(
            recipe="demo",
            changes={**SMALL, **_TRAINING, "stages.pretrain.steps": 240, "evaluation.every": 40},
            variants=_GRADIENTS,
            loops=(12,),
            rates=(3e-3, 1e-2),
            seeds=3,
            held_out={"sequences": 64, "sequence_length": 64, "batch_size": 8},
        ),
        Scale.GPU: VariantGrid(
            recipe="demo",
            changes={
                **ALIKE,
                **_TRAINING,
                "stages.pretrain.batch_size": 32,
                "stages.pretrain.steps": 3000,
                "evaluation.every": 200,
            },
            variants=_GRADIENTS,
            loops=(12,),
            rates=(1e-3, 3e-3),
            seeds=3,
            held_out={"sequences": 256, "sequence_length": 128, "batch_size": 8},
        ),
        Scale.PAPER: VariantGrid(
            recipe="text-small",
            changes={
                **ALIKE,
                **_TRAINING,
                "stages.pretrain.batch_size": 64,
                "evaluation.every": 400,
                "data.validation_fraction": 0.05,
            },
            variants=_GRADIENTS,
            loops=(12,),
            rates=(1e-3, 3e-3),
            seeds=3,
            held_out={"sequences": 1024, "sequence_length": 256, "batch_size": 8},
        ),
    }
)


# Memory and gradients


Loop = Callable[[Any, Array], Array]
Solve = Callable[[Loop, Any, Array], Array]
"""A function of a loop, its parameters and the first state, which returns the last state."""


def unrolled(loops: int, *, remat: bool = False) -> Solve:
    """Returns the plain way: a number of loops, with gradients through all of them."""

    def solve(loop: Loop, params: Any, start: Array) -> Array:
        def step(state: Array, _: None) -> tuple[Array, None]:
            return loop(params, state), None

        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False) if remat else step, start, None, length=loops)[0]

    return solve


def solved(tolerance: float, *, most: int, kind: SolverKind = SolverKind.LOOPS) -> Solve:
    """Returns a solver of the fixed point with the implicit gradient, both to a tolerance."""
    solver = Solver(kind=kind, tolerance=tolerance, max_loops=most)
    return lambda loop, params, start: implicit(loop, params, start, solver)[0]


def through_last(loops: int, *, tolerance: float, most: int) -> Solve:
    """Returns a solver of the fixed point with gradients through a few loops from there."""
    solver = Solver(tolerance=tolerance, max_loops=most)

    def solve(loop: Loop, params: Any, start: Array) -> Array:
        state, _ = fixed_point(functools.partial(loop, jax.lax.stop_gradient(params)), start, solver)
        return phantom(loop, params, state, loops=loops)

    return solve


def loss_of(model: LoopLM, tokens: Int[Array, "B S"], solve: Solve) -> Callable[[Params], Float[Array, ""]]:
    """Returns the loss of the next token at the state that `solve` returns, as a function of the parameters."""

    def loss(params: Params) -> Float[Array, ""]:
        context, _, _ = cast(Any, model.apply({"params": params}, tokens[:, :-1], method="begin"))

        # The embedded input depends on the parameters, so it is computed inside the loop that is differentiated.
        def loop(params: Params, state: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
            embedded, _ = cast(Any, model.apply({"params": params}, tokens[:, :-1], context, method="embed"))
            output, _, _ = cast(Any, model.apply({"params": params}, state, embedded, context, 1, method="loop_step"))
            return output.state

        start = jnp.zeros((*tokens[:, :-1].shape, model.config.width))
        last = solve(loop, params, start)
        return jnp.mean(token_losses(last[None], head_matrix(params, model.config), tokens[:, 1:]))

    return loss


def _measured(sizes: Sizes, seed: int) -> tuple[LoopLM, Params, Int[Array, "B S"]]:
    """Returns a model with its initial weights, and random tokens."""
    model = sizes.model()
    tokens = jax.random.randint(jax.random.key(seed), (sizes.batch, sizes.length + 1), 0, sizes.vocab_size)
    return model, init_params(model, jax.random.key(seed)), tokens


def memory(sizes: Sizes) -> dict[str, list[int]]:
    """Returns the bytes of temporaries of loss and gradient by number of loops, for each way of solving."""
    model, params, tokens = _measured(sizes, 0)
    ways: Mapping[str, Callable[[int], Solve]] = {
        "unrolled": unrolled,
        "unrolled, recomputed": functools.partial(unrolled, remat=True),
        "implicit": lambda loops: solved(0.0, most=loops),
        "phantom, k=4": lambda loops: through_last(4, tolerance=0.0, most=loops),
        "one step": lambda loops: through_last(1, tolerance=0.0, most=loops),
    }

    def of(solve: Solve) -> int:
        program = jax.jit(jax.grad(loss_of(model, tokens, solve))).lower(params).compile()
        return int(cast(Any, program.memory_analysis()).temp_size_in_bytes)

    return {name: [of(way(loops)) for loops in sizes.loops] for name, way in ways.items()}


_TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_PHANTOMS = (1, 2, 4, 8)


def gradients(sizes: Sizes, seed: int) -> dict[str, dict[str, float]]:
    """Returns the relative error and the cosine of each gradient against that through many unrolled loops."""
    model, params, tokens = _measured(sizes, seed)

    def of(solve: Solve) -> Float[Array, "N"]:
        gradient = jax.jit(jax.grad(loss_of(model, tokens, solve)))(params)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])

    reference = of(unrolled(sizes.unrolled))

    def compared(solve: Solve) -> dict[str, float]:
        gradient = of(solve)
        error = jnp.linalg.norm(gradient - reference) / jnp.linalg.norm(reference)
        cosine = gradient @ reference / (jnp.linalg.norm(gradient) * jnp.linalg.norm(reference))
        return {"error": float(error), "cosine": float(cosine)}

    most = sizes.unrolled
    found = {f"implicit, {tolerance:g}": compared(solved(tolerance, most=most)) for tolerance in _TOLERANCES}
    found["implicit, 1e-05, Broyden"] = compared(solved(1e-5, most=most, kind=SolverKind.BROYDEN))
    for loops in _PHANTOMS:
        found[f"phantom, k={loops}"] = compared(through_last(loops, tolerance=1e-6, most=most))
    return found


class Equilibrium:
    """The experiment on deep equilibrium models."""

    name = "equilibrium"
    claim = "a loop at its fixed point trains in the memory of one loop; cheaper gradients are less exact"
    scales = tuple(GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns the cells of memory and gradients, and one per way of training, learning rate and seed."""
        training = GRIDS[scale].cells()
        return (
            *SIZES[scale].cells(),
            *(dataclasses.replace(cell, settings={"part": _TRAIN, **cell.settings}) for cell in training),
        )

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Measures memory or gradients, or trains."""
        if cell.settings["part"] == _TRAIN:
            return {"part": _TRAIN, **train_variant(cell, folder, self.name, console).figures}

        sizes = Sizes(**cell.settings["sizes"])
        if cell.settings["part"] == _MEMORY:
            return {"part": _MEMORY, "loops": list(sizes.loops), "bytes": memory(sizes)}
        seed = cell.settings["seed"]
        return {"part": _GRADIENT, "unrolled": sizes.unrolled, "gradients": gradients(sizes, seed), "seed": seed}

    def report(self, records: Sequence[Record]) -> Report:
        """Returns a table and a figure of each part that was run."""
        tables, findings = [], []
        figures: dict[str, Callable[[Path], None]] = {}
        parts = {part: [record for record in records if record.result["part"] == part] for part in _PARTS}

        for record in parts[_MEMORY]:
            tables.append(_memory_table(record.result))
            findings.append(_memory_finding(record.result))
            figures["memory.png"] = functools.partial(_plot_memory, record.result)
        if parts[_GRADIENT]:
            tables.append(_gradient_table([record.result for record in parts[_GRADIENT]]))
        if parts[_TRAIN]:
            tables.append(_training_table(by_variant(parts[_TRAIN])))
        return Report(tables=tables, findings=findings, figures=figures)


_PARTS = (_MEMORY, _GRADIENT, _TRAIN)


# Reporting


def _memory_table(result: Mapping[str, Any]) -> Table:
    """Returns MiB of temporaries by number of loops."""
    rows = [[way, *(f"{size / 2**20:.1f}" for size in sizes)] for way, sizes in result["bytes"].items()]
    columns = ["gradient", *(f"T = {loops}" for loops in result["loops"])]
    return Table(title="Temporaries of loss and gradient, MiB, from the compiler", columns=columns, rows=rows)


def _memory_finding(result: Mapping[str, Any]) -> str:
    """Returns how much memory grows from the fewest loops to the most."""
    growth = {way: sizes[-1] / sizes[0] for way, sizes in result["bytes"].items()}
    said = ", ".join(f"{way} {factor:.2f}" for way, factor in growth.items())
    saved = 1 - result["bytes"]["implicit"][-1] / result["bytes"]["unrolled"][-1]
    return (
        f"Memory at T = {result['loops'][-1]} in units of that at T = {result['loops'][0]}: {said}. The implicit "
        f"gradient takes {saved:.0%} less than {result['loops'][-1]} unrolled loops. Printed: 88 % less."
    )


def _gradient_table(results: Results) -> Table:
    """Returns relative error and cosine of each gradient, means over seeds."""
    rows = []
    for name in results[0]["gradients"]:
        errors, cosines = ([result["gradients"][name][what] for result in results] for what in ("error", "cosine"))
        rows.append([name, f"{np.mean(errors):.1e}", f"{max(errors):.1e}", f"{np.mean(cosines):.4f}"])
    title = f"Gradients against {results[0]['unrolled']} unrolled loops, {len(results)} seeds of initial weights"
    return Table(title=title, columns=("gradient", "relative error", "largest", "cosine"), rows=rows)


def _training_table(found: Mapping[str, Results]) -> Table:
    """Returns held-out loss after equal steps, and after the time of the fastest run."""
    best = {variant: best_rate(results, final_loss) for variant, results in found.items()}
    time = min(run_seconds(results) for _, results in best.values())
    rows = [
        [
            variant,
            f"{rate:g}",
            str(len(results)),
            mean_range([final_loss(result) for result in results]),
            mean_range([at_equal_time(result, time) for result in results]),
            str(sum(result["spikes"] for result in results)),
            f"{1000 * np.median([result['seconds_per_step'] for result in results]):.0f}",
            f"{np.mean([result['solver_loops'] or result['loops'] for result in results]):.1f}",
        ]
        for variant, (rate, results) in best.items()
    ]
    columns = ("gradient", "best rate", "seeds", "equal steps", "equal time", "spikes", "ms a step", "loops")
    (_, first), *_ = best.values()
    return Table(title=f"Held-out loss (nats/token), {first[0]['steps']} steps", columns=columns, rows=rows)


def _plot_memory(result: Mapping[str, Any], path: Path) -> None:
    """Plots memory by number of loops."""
    made, (axes,) = figure(width=7.0)
    for way, sizes in result["bytes"].items():
        axes.plot(result["loops"], [size / 2**20 for size in sizes], marker="o", label=way)
    axes.set(xlabel="loops", ylabel="temporaries (MiB)", xscale="log", yscale="log")
    axes.set_xticks(result["loops"], [str(loops) for loops in result["loops"]], minor=False)
    axes.legend(frameon=False)
    save_figure(made, path)


EQUILIBRIUM = Equilibrium()
