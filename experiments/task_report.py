"""Tables and figures of grids over k layers looped T times: our accuracies over seeds, next to the published ones."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.experiment import Record
from looplm_jax.evaluation import Table, figure, save_figure


def accuracies(records: Sequence[Record], test: str) -> dict[str, list[float]]:
    """Returns the accuracy after the last trained loop of each seed, by shape."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record.result["shape"], []).append(record.result["at_trained_depth"][test])
    return found


def shape_table(
    records: Sequence[Record], tests: Mapping[str, str], printed: Mapping[str, Mapping[str, float]], title: str
) -> Table:
    """Returns a table with one row per shape: per test, the best seed, mean and range of all, and the published value.

    Args:
      records: the records of a grid.
      tests: the column title of each test, by the name of the test.
      printed: published accuracy in percent, by shape and test.
      title: the title of the table.
    """
    columns = ["layers ⊗ loops", "parameters", "seeds"]
    columns += [f"{name}: {what}" for name in tests.values() for what in ("best", "mean (range)", "printed")]
    sizes = {record.result["shape"]: record.result["parameters"] for record in records}

    rows = []
    for shape, size in sizes.items():
        row = [shape, f"{size:,}", str(sum(record.result["shape"] == shape for record in records))]
        for test in tests:
            values = 100 * np.array(accuracies(records, test)[shape])
            there = printed.get(shape, {}).get(test)
            row += [
                f"{values.max():.1f}",
                f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})",
                "" if there is None else f"{there:.1f}",
            ]
        rows.append(row)

    rows.append(["commonest answer", "", ""] + [cell for test in tests for cell in (_commonest(records, test), "", "")])
    return Table(title=title, columns=columns, rows=rows)


def _commonest(records: Sequence[Record], test: str) -> str:
    """Returns the accuracy of a model that always gives the same answer."""
    return f"{100 * max(record.result['commonest'][test] for record in records):.1f}"


def compare(records: Sequence[Record], test: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Returns one sentence per pair of shapes of equal parameters, without and with loops: the gain of looping."""
    found = accuracies(records, test)
    return [
        f"{looped} against {plain} at equal parameters ({test}): {100 * np.mean(found[looped]):.1f} % against "
        f"{100 * np.mean(found[plain]):.1f} % on average over {len(found[looped])} and {len(found[plain])} seeds."
        for plain, looped in pairs
        if plain in found and looped in found
    ]


def plot_curves(records: Sequence[Record], title: str, path: Path) -> None:
    """Plots training loss by step: one line per cell, one color per shape. Raises UserError without matplotlib."""
    made, (axes,) = figure(width=7)
    shapes = list(dict.fromkeys(record.result["shape"] for record in records))

    for record in records:
        steps, losses = zip(*record.result["curve"], strict=True)
        shape = record.result["shape"]
        axes.plot(steps, losses, color=f"C{shapes.index(shape)}", alpha=0.8, linewidth=1, label=shape)
    # A dictionary keeps one entry per label.
    # {label: line}
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), title="layers ⊗ loops")
    axes.set(title=title, xlabel="step", ylabel="training loss (nats)")
    save_figure(made, path)


def plot_depths(records: Sequence[Record], test: str, title: str, path: Path) -> None:
    """Plots accuracy by loops, up to twice the trained number: mean over seeds, and their range."""
    made, (axes,) = figure(width=7)
    shapes = list(dict.fromkeys(record.result["shape"] for record in records))

    for number, shape in enumerate(shapes):
        runs = np.array([record.result["accuracy"][test] for record in records if record.result["shape"] == shape])
        loops = np.arange(1, runs.shape[1] + 1)
        axes.plot(loops, 100 * runs.mean(0), color=f"C{number}", marker="o", label=shape)
        axes.fill_between(loops, 100 * runs.min(0), 100 * runs.max(0), color=f"C{number}", alpha=0.2, linewidth=0)

    axes.legend(title="layers ⊗ loops")
    axes.set(title=title, xlabel="loops at test", ylabel="exact match (%)", ylim=(0, 101))
    save_figure(made, path)


def curves_and_depths(records: Sequence[Record], tests: Sequence[str], title: str) -> dict[str, Callable[[Path], None]]:
    """Returns the figures that every such grid has, by file name."""
    figures: dict[str, Callable[[Path], None]] = {
        "curves.png": functools.partial(plot_curves, records, f"{title}: training loss")
    }
    for test in tests:
        # The name of a test may have characters that file names should not have.
        name = re.sub(r"[^a-zA-Z0-9=]+", "_", test)
        figures[f"depths_{name}.png"] = functools.partial(plot_depths, records, test, f"{title}, {test}")
    return figures
