"""Stabilizers of deep loops: published remedies side by side, with the same text, seeds and learning rates.

    python -m experiments stabilizers --scale cpu

Looped language models become unstable at eight and more loops. Each remedy has its own code and baseline; here they
are options of one block, and everything else is the same, including the loss of the last loop alone. The methods:

`plain`: pre-norm layers, and no norm of the state between loops. `ouro`: sandwich norms and a norm of the state in
every loop (2510.25741). `ouro, small norms`: the same, whose second norms start at 0.1. `ouro + input`: the same,
with the normalized input added in every loop. `outer`: norms of the sum, as in Huginn. `deep loop`: `outer` with
scaled sums (2607.13491). `1/T`: `plain` with branches scaled by the number of loops (2606.18524). `parcae`: `plain`
with a diagonal injection of norm below 1 (2604.12946). `query`: every loop starts from the input, and queries come
from the state (2605.18797). `huginn`: `outer` with an adapter (2502.05171), at fixed depth; `huginn, random` with a
drawn depth, and `huginn, random, k=4` with gradients through the last four loops only. `stars`: `plain` with a
penalty on the spectral norm of the Jacobian of the loop, and `stars, outer` the same on `outer`. `loopformer`: `plain`
with layers that know the time, and a second pass with fewer loops (2602.11451).

Each run reports: training and held-out loss at the trained depth T and at 2T and 4T; spikes, which are losses 0.5
nats above the mean of the last 20; the gradient's norm before clipping; the size of the state, `|h_T - h_{T-1}| /
|h_T|`, the spectral radius of one more loop at h_T, per row of held-out text, and `|J|_F^2 / n`. A loop is causal, so
its Jacobian is block triangular over positions, and the radius does not show growth along the sequence.

`cpu`: one layer of width 64, 160 steps of 8 x 64 tokens. `gpu` (not run): the model of `demo`, 2,000 steps. `paper`
(not run): `text-small`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.optimizers import plot_rates, rate_table
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
from looplm_jax.config import TimeSignal
from looplm_jax.data import Batch
from looplm_jax.evaluation import Table, depth_sweep, figure, save_figure
from looplm_jax.losses import jacobian_penalty, spectral_radius
from looplm_jax.models import LoopLM, LoopTime, Params

# Methods

_PLAIN: Changes = {"model.norm_placement": "pre", "model.state_norm": "readout"}
_OUTER: Changes = {"model.norm_placement": "outer", "model.state_norm": "readout"}
HUGINN: Changes = {**_OUTER, "model.injection": "linear", "model.initial_state": "noise"}


# Their published weights.
_STARS: Changes = {
    "stages.pretrain.read_out": "last",
    "stages.pretrain.jacobian.weight": 0.1,
    "stages.pretrain.jacobian.kind": "spectral",
}
_LOOPFORMER: Changes = {
    "model.time_signal": "modulation",
    "stages.pretrain.read_out": "last",
    "stages.pretrain.shortcut.weight_loss": 0.1,
    "stages.pretrain.shortcut.weight_state": 0.1,
}


def random_depth(backprop_loops: int) -> Callable[[int], Changes]:
    """Returns the block of Huginn with drawn depths of mean T, at most 4T, and gradients through the last loops."""

    def changes(loops: int) -> Changes:
        return {
            **HUGINN,
            "stages.pretrain.read_out": "last",
            "stages.pretrain.depth.kind": "poisson_log_normal",
            "stages.pretrain.depth.mean": float(loops),
            "stages.pretrain.depth.max": 4 * loops,
            "stages.pretrain.backprop_loops": backprop_loops,
        }

    return changes


def _parcae(width: int) -> Changes:
    """Returns the injection of Parcae, whose noise depends on the width."""
    return {
        **_PLAIN,
        "model.injection": "diagonal",
        "model.injection_norm": True,
        "model.initial_state": "noise",
        "model.state_std": math.sqrt(2 / (5 * width)),
    }


def _methods(width: int) -> Mapping[str, Callable[[int], Changes]]:
    """Returns all methods for models of a width."""
    return {
        "plain": always(_PLAIN),
        "ouro": always({}),
        "ouro, small norms": always({"model.second_norm_init": 0.1}),
        "ouro + input": always({"model.injection": "add", "model.injection_norm": True}),
        "outer": always(_OUTER),
        "deep loop": always({**_OUTER, "model.residual": "deep_loop"}),
        "1/T": always({**_PLAIN, "model.residual": "per_loop"}),
        "parcae": always(_parcae(width)),
        "query": always({"model.norm_placement": "pre", "model.injection": "query", "model.injection_norm": True}),
        "huginn": always(HUGINN),
        "huginn, random": random_depth(0),
        "huginn, random, k=4": random_depth(4),
        "stars": always({**_PLAIN, **_STARS}),
        "stars, outer": always({**_OUTER, **_STARS}),
        "loopformer": always({**_PLAIN, **_LOOPFORMER}),
    }


# Grids

_LAST: Changes = {"stages.pretrain.objective": "last_loss"}

GRIDS: Mapping[Scale, VariantGrid] = MappingProxyType(
    {
        Scale.SMOKE: VariantGrid(
            recipe="demo",
            changes={**TINY, **_LAST},
            variants={name: _methods(32)[name] for name in ("ouro + input", "huginn, random, k=4")},
            loops=(4,),
            rates=(3e-3,),
            seeds=1,
            held_out={"sequences": 8, "sequence_length": 64, "batch_size": 8},
        ),
        Scale.CPU: VariantGrid(
            recipe="demo",
            changes={**SMALL, **_LAST, "stages.pretrain.steps": 160},
            variants=_methods(64),
            loops=(12, 8, 16),
            rates=(3e-3, 1e-2, 1e-3, 3e-2, 3e-4),
            seeds=3,
            held_out={"sequences": 64, "sequence_length": 64, "batch_size": 8},
        ),
        Scale.GPU: VariantGrid(
            recipe="demo",
            changes={
                **ALIKE,
                **_LAST,
                "stages.pretrain.batch_size": 32,
                "stages.pretrain.steps": 2000,
                "stages.pretrain.warmup_steps": 100,
            },
            variants=_methods(192),
            loops=(12, 8, 16, 24),
            rates=(3e-3, 1e-2, 1e-3, 3e-2, 3e-4),
            seeds=3,
            held_out={"sequences": 256, "sequence_length": 128, "batch_size": 8},
        ),
        Scale.PAPER: VariantGrid(
            recipe="text-small",
            changes={**ALIKE, **_LAST, "stages.pretrain.batch_size": 64, "data.validation_fraction": 0.05},
            variants=_methods(256),
            loops=(12, 8, 16, 24),
            rates=(1e-3, 3e-3, 3e-4, 1e-2, 1e-4),
            seeds=3,
            held_out={"sequences": 1024, "sequence_length": 256, "batch_size": 8},
        ),
    }
)


# Measurement


@functools.partial(jax.jit, static_argnames=("model", "loops"))
def loop_figures(model: LoopLM, params: Params, batch: Batch, *, loops: int) -> dict[str, Array]:
    """Returns the figures of one more loop at the state after `loops` loops, averaged over the sequences of a batch.

    Layers that know the time take that of the last loop again.

    Returns:
      state_rms: the root mean square of the state; relative_step: `|h_T - h_{T-1}| / |h_T|`; radius: the spectral
        radius; frobenius: `|J|_F^2 / n`, from four products.
    """
    time = LoopTime.even(loops - 1, loops) if model.config.time_signal is TimeSignal.MODULATION else None
    variables = {"params": params}
    where = {"positions": batch.positions, "segment_ids": batch.segment_ids}
    context, embedded, _ = cast(Any, model.apply(variables, batch.tokens, **where, method="begin"))
    states = cast(Any, model.apply(variables, batch.tokens, loops=loops, **where, return_state=True)).state

    def loop(state: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        output, _, _ = cast(Any, model.apply(variables, state, embedded, context, loops, time=time, method="loop_step"))
        return output.state

    last = states[-1]
    directions = jax.random.normal(jax.random.key(0), (5, *last.shape))
    norms = jnp.linalg.norm(last.reshape(len(last), -1), axis=1)
    steps = jnp.linalg.norm((last - states[-2]).reshape(len(last), -1), axis=1)
    penalties = jax.lax.map(lambda direction: jacobian_penalty(loop, last, direction), directions[1:])
    return {
        "state_rms": jnp.sqrt(jnp.mean(jnp.square(last))),
        "relative_step": jnp.mean(steps / norms),
        "radius": jnp.mean(spectral_radius(loop, last, directions[0])),
        "frobenius": jnp.mean(penalties),
    }


class Stabilizers:
    """The league of stabilizers."""

    name = "stabilizers"
    claim = "remedies against instability at eight and more loops, side by side"
    scales = tuple(GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per method, learning rate, number of loops and seed."""
        return GRIDS[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains a model with the method, and measures its loop."""
        run, loops = train_variant(cell, folder, self.name, console), cell.settings["loops"]
        model, params = run.loaded
        sweep = depth_sweep(model, params, run.held_out, max_loops=4 * loops).curve.loss
        batch = next(iter(run.held_out))
        measured = jax.device_get(loop_figures(model, params, batch, loops=loops))

        return {
            **run.figures,
            "held_out": {name: sweep[at - 1] for name, at in _depths(loops).items()},
            **{name: float(value) for name, value in measured.items()},
        }

    def report(self, records: Sequence[Record]) -> Report:
        """Returns a league table and a sweep of rates per number of loops, and a figure of both."""
        by_loops: dict[int, dict[str, list[Mapping[str, Any]]]] = {}
        for loops in sorted({record.result["loops"] for record in records}):
            by_loops[loops] = by_variant([record for record in records if record.result["loops"] == loops])

        tables, findings = [], []
        for loops, found in by_loops.items():
            tables.append(_league(loops, found))
            title = f"T = {loops}: held-out loss at T by learning rate"
            tables.append(rate_table(found, _at_trained_depth, title))
            findings.append(_finding(loops, found))

        figures = {
            f"stabilizers-T{loops}.png": functools.partial(_plot, loops, found) for loops, found in by_loops.items()
        }
        return Report(tables=tables, findings=findings, figures=figures)


def _depths(loops: int) -> dict[str, int]:
    """Returns the depths at which a model is measured, by their names in the results."""
    return {"T/2": max(loops // 2, 1), "T": loops, "2T": 2 * loops, "4T": 4 * loops}


# Reporting


def _at_trained_depth(result: Mapping[str, Any]) -> float:
    """Returns the held-out loss at the trained depth."""
    return float(result["held_out"]["T"])


def _league(loops: int, found: Mapping[str, Results]) -> Table:
    """Returns one row per method at its best learning rate, best first."""
    best = {method: best_rate(results, _at_trained_depth) for method, results in found.items()}
    ordered = sorted(best, key=lambda method: np.mean([_at_trained_depth(result) for result in best[method][1]]))
    rows = []
    for method in ordered:
        rate, results = best[method]

        def mean(name: str, results: Results = results) -> float:
            return float(np.mean([result[name] for result in results]))

        norms = [result["gradient_norm"] for result in results]
        rows.append(
            [
                method,
                f"{rate:g}",
                str(len(results)),
                f"{mean('training_loss'):.3f}",
                *(mean_range([result["held_out"][depth] for result in results]) for depth in ("T", "2T", "4T")),
                f"{sum(result['spikes'] for result in found[method])} / {len(found[method])}",
                f"{np.median([norm['median'] for norm in norms]):.2f} / {max(norm['max'] for norm in norms):.2f}",
                f"{mean('radius'):.2f}",
                f"{mean('frobenius'):.3f}",
                f"{mean('state_rms'):.1f}",
                f"{mean('relative_step'):.3f}",
                f"{1000 * np.median([result['seconds_per_step'] for result in results]):.0f}",
                f"{results[0]['flops_per_token'] / 1e6:.2f}",
                f"{results[0]['parameters']:,}",
            ]
        )
    columns = (
        *("method", "best rate", "seeds", "training", "held-out at T", "at 2T", "at 4T", "spikes / runs"),
        *("gradient median / max", "radius", "|J|²/n", "state", "last step", "ms a step", "MFLOP a token"),
    )
    return Table(
        title=f"T = {loops}: loss (nats/token) at the best learning rate of each method, best first",
        columns=[*columns, "parameters"],
        rows=rows,
    )


def _finding(loops: int, found: Mapping[str, Results]) -> str:
    """Returns the best method at T, the one that changes least beyond T, and the runs with spikes."""
    best = {method: best_rate(results, _at_trained_depth)[1] for method, results in found.items()}
    at = {
        depth: {
            method: float(np.mean([result["held_out"][depth] for result in results]))
            for method, results in best.items()
        }
        for depth in ("T", "2T")
    }
    first = min(at["T"], key=lambda method: at["T"][method])
    deep = min(at["2T"], key=lambda method: at["2T"][method])
    spiky = sorted(method for method, results in found.items() if any(result["spikes"] for result in results))
    return (
        f"T = {loops}: the lowest held-out loss at T is that of {first} ({at['T'][first]:.3f}), at 2T that of {deep} "
        f"({at['2T'][deep]:.3f}); methods with spikes at some rate: {', '.join(spiky) or 'none'}."
    )


def _plot(loops: int, found: Mapping[str, Results], path: Path) -> None:
    """Plots held-out loss at T by learning rate, and by depth at the best rate; means over seeds."""
    made, (left, right) = figure(columns=2, width=6.0)
    depths = _depths(loops)
    for number, (method, results) in enumerate(found.items()):
        color, style = f"C{number % 10}", "o-" if number < 10 else "s--"  # there are ten colors
        plot_rates(left, results, _at_trained_depth, color, method, style)
        _, best = best_rate(results, _at_trained_depth)
        means = [np.mean([result["held_out"][name] for result in best]) for name in depths]
        right.plot(list(depths.values()), means, style, color=color, label=method)

    left.set(xlabel="learning rate", ylabel="held-out loss at T (nats/token)", xscale="log", title=f"T = {loops}")
    right.set(xlabel="loops of the call", ylabel="held-out loss (nats/token)", xscale="log")
    right.set_xticks(list(depths.values()), [str(depth) for depth in depths.values()], minor=False)
    right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(made, path)


STABILIZERS = Stabilizers()
