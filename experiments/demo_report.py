"""The report of the demo: tables and figures on held-out text, with the command and time of every part."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from looplm_jax.config import Recipe
from looplm_jax.errors import UserError
from looplm_jax.evaluation import Curve, DepthSweep, Table, plot_depths, plot_exits
from looplm_jax.models.looplm import count_params

_COLUMNS = 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """A prompt, the tokens of its continuation, and the loops of each."""

    prompt: str
    pieces: Sequence[str]
    exit_loops: Sequence[int]


def write_report(
    out: Path,
    recipe: Recipe,
    seconds: Mapping[str, float],
    commands: Mapping[str, str],
    generated: Sequence[Generated],
) -> list[str]:
    """Writes `report.md` and its figures from the evaluations in `out`. Returns the names of the files."""
    evaluations = {
        name: json.loads((out / "evaluation" / name / "evaluation.json").read_text())
        for name in ("stage1", "stage2", "one-loop")
    }

    figures = _figures(out, evaluations)
    sections = [
        _title(recipe),
        _depths(evaluations),
        _exits(evaluations),
        *(f"![{name}]({name})\n" for name in figures),
        _generations(generated),
        _parts(seconds, commands),
    ]

    (out / "report.md").write_text("\n".join(sections), encoding="utf-8")
    return ["report.md", *figures]


# Sections


def _title(recipe: Recipe) -> str:
    """Returns the heading and a summary of the model and its training."""
    stages = "; ".join(
        f"{stage.name}: {stage.steps} steps of {stage.batch_size} x {stage.sequence_length} tokens, {stage.loops} loops"
        for stage in recipe.stages
    )
    return (
        f"# A looped language model, end to end\n\nLayers: {recipe.model.num_layers}, of width {recipe.model.width}; "
        f"{count_params(recipe.model):,} parameters, {recipe.model.vocab_size} tokens in the vocabulary. {stages}. "
        "All numbers are on held-out files of the standard library.\n"
    )


def _depths(evaluations: Mapping[str, Any]) -> str:
    """Returns the section with the loss at every depth."""
    looped, one_loop = evaluations["stage2"]["depths"], evaluations["one-loop"]["depths"]
    rows = [
        [f"{loops:.0f}", f"{loss:.4f}", f"{accuracy:.2%}", "trained depth" if loops == looped["trained_loops"] else ""]
        for loops, loss, accuracy in zip(looped["loops"], looped["loss"], looped["accuracy"], strict=True)
    ]

    rows.append(["no loops", f"{one_loop['loss'][0]:.4f}", f"{one_loop['accuracy'][0]:.2%}", "trained with T = 1"])

    columns = ("loops", "loss (nats/token)", "accuracy", "")
    table = Table(title="depth", columns=columns, rows=rows, marked=looped["trained_loops"] - 1).markdown()
    return f"## Loss at every depth, {looped['tokens']:,} held-out tokens\n\n{table}\n{_verdict(looped, one_loop)}\n"


def _verdict(looped: Mapping[str, Any], one_loop: Mapping[str, Any]) -> str:
    """Returns the comparison of the trained depth with one loop and with the twin without loops."""
    trained = looped["trained_loops"]
    first, deep, plain = looped["loss"][0], looped["loss"][trained - 1], one_loop["loss"][0]
    return (
        f"At T = {trained} the loss is {_against(deep, first)} that at T = 1, and {_against(deep, plain)} that of the "
        "same layers trained without loops (equal parameters, equal tokens)."
    )


def _against(loss: float, other: float) -> str:
    """Returns the difference of two losses in words."""
    return f"{abs(loss - other):.4f} nats {'below' if loss < other else 'above'}"


def _exits(evaluations: Mapping[str, Any]) -> str:
    """Returns the section about early exit before and after Stage II."""
    before, after = (evaluations[name]["exits"] for name in ("stage1", "stage2"))
    rows = [
        [f"q={q:g}", f"{l0:.2f}", f"{x0:.4f}", f"{l1:.2f}", f"{x1:.4f}"]
        for q, l0, x0, l1, x1 in zip(
            after["q_exit"]["q"],
            before["q_exit"]["loops"],
            before["q_exit"]["loss"],
            after["q_exit"]["loops"],
            after["q_exit"]["loss"],
            strict=True,
        )
    ]

    columns = ("exit", "mean loops, Stage I", "loss, Stage I", "mean loops, Stage II", "loss, Stage II")
    table = Table(title="exits", columns=columns, rows=rows).markdown()

    areas = (
        "Mean loss over all budgets (area under the curve divided by its span): "
        f"fixed depth {after['fixed']['area']:.4f}, "
        f"Stage I gate {before['q_exit']['area']:.4f}, Stage II gate {after['q_exit']['area']:.4f}. Lower is better."
    )
    return f"## Early exit before and after Stage II\n\n{table}\n{areas}\n"


# Figures


def _figures(out: Path, evaluations: Mapping[str, Any]) -> list[str]:
    """Draws the figures. Returns their names, or none if matplotlib is not installed."""
    try:
        one_loop = _sweep(evaluations["one-loop"], deepest=1)
        plot_depths({"looped": _sweep(evaluations["stage2"]), "without loops": one_loop}, out / "depth.png")
        plot_exits(
            {
                "fixed depth": _curve(evaluations["stage2"]["exits"]["fixed"]),
                "Q-exit, Stage I gate": _curve(evaluations["stage1"]["exits"]["q_exit"]),
                "Q-exit, Stage II gate": _curve(evaluations["stage2"]["exits"]["q_exit"]),
            },
            out / "exit.png",
        )
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return []
    return ["depth.png", "exit.png", "looped/training.png"]


def _sweep(evaluation: Mapping[str, Any], *, deepest: int | None = None) -> DepthSweep:
    """Returns the sweep of an evaluation, optionally only its first depths."""
    depths = evaluation["depths"]
    curve = _curve(depths, deepest=deepest)
    return DepthSweep(curve=curve, trained_loops=depths["trained_loops"], tokens=depths["tokens"])


def _curve(values: Mapping[str, Any], *, deepest: int | None = None) -> Curve:
    """Returns the curve of stored points, optionally only the first ones."""
    return Curve.of(*(values[name][:deepest] for name in ("loops", "loss", "accuracy")))


# Generated text and timings


def _generations(generated: Sequence[Generated]) -> str:
    """Returns the section with generated text."""
    blocks = [f"```\n{_aligned(sample)}\n```\n" for sample in generated]
    return "\n".join(["## Text by Q-exit, with the loops of each token below it\n", *blocks])


def _aligned(sample: Generated) -> str:
    """Returns the prompt, followed by lines of tokens with their loops underneath."""
    shown = [piece.replace("\n", "⏎").replace("\t", "⇥") for piece in sample.pieces]
    lines = [sample.prompt.replace("\n", "⏎")]

    tokens = counts = ""

    for piece, loops in zip(shown, sample.exit_loops, strict=True):
        # A new line never splits a token from its number of loops.
        if len(tokens) + len(piece) > _COLUMNS:
            lines += [tokens, counts]
            tokens = counts = ""
        tokens += piece
        # Aligned with the start of the token above.
        counts += str(loops).ljust(len(piece))

    return "\n".join([*lines, tokens, counts])


def _parts(seconds: Mapping[str, float], commands: Mapping[str, str]) -> str:
    """Returns the section with the time and command of every part."""
    rows = [[name, f"{seconds[name]:.0f} s", f"`{' '.join(command.split())}`"] for name, command in commands.items()]
    table = Table(title="parts", columns=("part", "wall time", "command"), rows=rows).markdown()
    total = sum(seconds.values())
    return f"## Parts\n\n{table}\n{total:.0f} s in all, the start of Python not counted.\n"
