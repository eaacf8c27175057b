"""Tables, findings and figures of the reachability experiment: for the construction, and for trained shapes."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.frame import Record, Report
from experiments.reachability_construction import VARIANTS, loops_needed
from experiments.task_grid import plot_curves
from looplm_jax.evaluation import Table, figure, save_figure

_NEARLY_ALL = 0.9


def construction_report(result: Mapping[str, Any]) -> Report:
    """Reports how many graphs the hand-built weights get exactly right, by diameter and loops."""
    variants = [variant.name for variant in VARIANTS]
    graphs = sum(result["diameters"].values())
    needed, fewer = ({name: _exact_at(result, name, offset) for name in variants} for offset in (0, -1))

    summary = Table(
        title=f"hand-built weights: {graphs:,} random digraphs of longest shortest path D, all pairs exact, %",
        columns=("edges", "ceil(log2 D) + 1 loops", "one loop fewer"),
        rows=[[name, f"{100 * needed[name] / graphs:.1f}", f"{100 * fewer[name] / graphs:.1f}"] for name in variants],
    )

    main = variants[0]
    finding = (
        f"With half the edges in the weights and half in the context the construction is exact on {needed[main]:,} of "
        f"{graphs:,} graphs at ceil(log2 D) + 1 loops, and wrong on {100 * (1 - fewer[main] / graphs):.1f} % with one "
        f"loop fewer; with all edges in the weights it is then wrong on {100 * (1 - fewer[variants[1]] / graphs):.1f} "
        f"%, with all in the context on {100 * (1 - fewer[variants[2]] / graphs):.1f} %."
    )

    return Report(
        tables=[summary, _by_loops(result, main)],
        findings=[finding],
        figures={"construction.png": functools.partial(_plot_construction, result, main)},
    )


def trained_report(records: Sequence[Record], chances: Mapping[str, float]) -> Report:
    """Reports the accuracy of trained shapes by distance and by loops, next to that of naming any root."""
    shapes = list(dict.fromkeys(record.result["shape"] for record in records))
    tests = list(records[0].result["accuracy"])

    columns = ("layers ⊗ loops", "parameters", "seeds", *(f"{test}: mean (range)" for test in tests))
    rows = [[shape, *_size(records, shape), *_at_trained_depth(records, shape)] for shape in shapes]
    rows.append(["any root", "", "", *(f"{100 * chances[test]:.1f}" for test in tests)])
    title = "trained: which root reaches a node, by the edges between; exact match on held-out graphs, %"
    # Looped shapes: accuracies are measured at twice the trained depth, so a plain shape has two.
    looped = [shape for shape in shapes if _runs(records, shape).shape[2] > 2]

    return Report(
        tables=[Table(title=title, columns=columns, rows=rows), *(_by_depth(records, shape) for shape in looped)],
        findings=[_said(records, shape) for shape in shapes] + [_first_loops(records, shape) for shape in looped],
        figures={
            "curves.png": functools.partial(plot_curves, records, "Reachability: training loss"),
            "distances.png": functools.partial(_plot_distances, records, shapes, chances),
            **{
                f"loops_{shape.replace('⊗', 'x')}.png": functools.partial(_plot_loops, records, shape)
                for shape in looped
            },
        },
    )


# The construction


def _exact_at(result: Mapping[str, Any], variant: str, offset: int) -> int:
    """Returns the number of graphs that are exact at the loops that the theorem needs, plus `offset`."""
    exact = result["exact"][variant]
    return sum(counts[loops_needed(int(diameter)) + offset] for diameter, counts in exact.items())


def _classes(result: Mapping[str, Any]) -> dict[int, list[str]]:
    """Groups the diameters that need equally many loops."""
    classes: dict[int, list[str]] = {}
    for diameter in sorted(result["diameters"], key=int):
        classes.setdefault(loops_needed(int(diameter)), []).append(diameter)
    return classes


def _shares(result: Mapping[str, Any], variant: str, diameters: Sequence[str]) -> Float[np.ndarray, "loops"]:
    """Returns the fraction of exact graphs by loops, over some diameters."""
    counts = np.sum([result["exact"][variant][diameter] for diameter in diameters], axis=0)
    return counts / sum(result["diameters"][diameter] for diameter in diameters)


def _by_loops(result: Mapping[str, Any], variant: str) -> Table:
    """Returns the table of exact graphs by loops, one row per group of diameters."""
    classes = _classes(result)
    loops = len(next(iter(result["exact"][variant].values())))

    rows = [
        [
            _span(diameters),
            str(sum(result["diameters"][diameter] for diameter in diameters)),
            str(needed),
            *(f"{100 * share:.1f}" for share in _shares(result, variant, diameters)),
        ]
        for needed, diameters in classes.items()
    ]

    return Table(
        title=f"{variant}: graphs all of whose pairs are exact, %, by loops; needed: ceil(log2 D) + 1",
        columns=("D", "graphs", "needed", *map(str, range(loops))),
        rows=rows,
    )


def _span(diameters: Sequence[str]) -> str:
    """Returns the first and the last of the diameters as text."""
    return diameters[0] if len(diameters) == 1 else f"{diameters[0]} to {diameters[-1]}"


# Trained shapes


def _runs(records: Sequence[Record], shape: str) -> Float[np.ndarray, "seeds tests loops"]:
    """Returns the accuracies of all seeds of a shape."""
    return np.array([list(record.result["accuracy"].values()) for record in records if record.result["shape"] == shape])


def _size(records: Sequence[Record], shape: str) -> list[str]:
    """Returns the parameters and the number of seeds of a shape, as text."""
    mine = [record for record in records if record.result["shape"] == shape]
    return [f"{mine[0].result['parameters']:,}", str(len(mine))]


def _trained(records: Sequence[Record], shape: str) -> Float[np.ndarray, "seeds tests"]:
    """Returns the accuracies in percent after the last trained loop."""
    runs = _runs(records, shape)
    return 100 * runs[:, :, runs.shape[2] // 2 - 1]


def _at_trained_depth(records: Sequence[Record], shape: str) -> list[str]:
    """Returns mean and range over seeds for each test, as text."""
    return [f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})" for values in _trained(records, shape).T]


def _said(records: Sequence[Record], shape: str) -> str:
    """Returns the finding about one shape."""
    values = _trained(records, shape)
    tests = records[0].result["accuracy"]
    means = "; ".join(f"{test}: {mean:.1f} %" for test, mean in zip(tests, values.mean(axis=0), strict=True))
    return f"{shape} on average over {_seeds(len(values))}: {means}."


def _first_loops(records: Sequence[Record], shape: str) -> str:
    """Returns the first loop after which nearly all answers are correct, by distance, as a sentence."""
    means = _runs(records, shape).mean(axis=0)
    firsts = [next((loop for loop, share in enumerate(test, 1) if share >= _NEARLY_ALL), None) for test in means]
    said = [f"{test}: {first or 'never'}" for test, first in zip(records[0].result["accuracy"], firsts, strict=True)]
    return f"{shape}, the first loop after which {100 * _NEARLY_ALL:.0f} % are right: {'; '.join(said)}."


def _seeds(number: int) -> str:
    """Returns a number of seeds as text."""
    return "1 seed" if number == 1 else f"{number} seeds"


def _by_depth(records: Sequence[Record], shape: str) -> Table:
    """Returns the table of accuracies of one shape by loops."""
    # [tests, loops]
    runs = 100 * _runs(records, shape).mean(axis=0)
    tests = list(records[0].result["accuracy"])
    trained = runs.shape[1] // 2
    return Table(
        title=f"{shape}, by loops at test (mean over seeds, %)",
        columns=("loops", *tests),
        rows=[[str(loops), *(f"{value:.1f}" for value in values)] for loops, values in enumerate(runs.T, 1)],
        marked=trained - 1,
    )


# Figures


def _plot_construction(result: Mapping[str, Any], variant: str, path: Path) -> None:
    """Plots the fraction of exact graphs by loops, and marks the loops that the theorem needs."""
    made, (axes,) = figure(width=6.4)
    for needed, diameters in _classes(result).items():
        # by number of loops, from 0
        shares = 100 * _shares(result, variant, diameters)
        (line,) = axes.plot(shares, marker="o", markersize=3, label=_span(diameters))
        axes.plot(needed, shares[needed], marker="o", color=line.get_color())
    axes.set(title="all pairs exact; large points: ceil(log2 D) + 1", xlabel="loops", ylabel="graphs (%)")
    axes.legend(title="D", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(made, path)


def _plot_distances(records: Sequence[Record], shapes: Sequence[str], chances: Mapping[str, float], path: Path) -> None:
    """Plots the accuracy by distance, one line per shape."""
    made, (axes,) = figure(width=6.4)
    tests = list(records[0].result["accuracy"])
    for shape in shapes:
        values = _trained(records, shape)
        axes.plot(tests, values.mean(axis=0), marker="o", label=shape)
        axes.fill_between(tests, values.min(axis=0), values.max(axis=0), alpha=0.2, linewidth=0)
    axes.plot(tests, [100 * chances[test] for test in tests], color="grey", linestyle=":", label="any root")
    axes.set(title="after the last trained loop", xlabel="asked", ylabel="exact match (%)", ylim=(0, 102))
    axes.legend(title="layers ⊗ loops")
    save_figure(made, path)


def _plot_loops(records: Sequence[Record], shape: str, path: Path) -> None:
    """Plots the accuracy of one shape by loops, one line per distance."""
    made, (axes,) = figure(width=6.4)
    runs = 100 * _runs(records, shape)
    loops = np.arange(1, runs.shape[2] + 1)
    for test, values in zip(records[0].result["accuracy"], runs.swapaxes(0, 1), strict=True):
        axes.plot(loops, values.mean(axis=0), marker="o", label=test)
        axes.fill_between(loops, values.min(axis=0), values.max(axis=0), alpha=0.2, linewidth=0)
    axes.axvline(runs.shape[2] / 2, color="grey", linestyle=":")
    axes.set(title=f"{shape}; dotted: as trained", xlabel="loops at test", ylabel="exact match (%)", ylim=(0, 102))
    axes.legend(title="asked")
    save_figure(made, path)
