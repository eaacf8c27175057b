"""Runs `looplm evaluate` on held-out documents: loads, measures, prints, and writes."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from looplm_jax import codec, strict_json
from looplm_jax.config import DataConfig, sources_like
from looplm_jax.data import ValidationBatches, validation_batches
from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import Evaluation, evaluate
from looplm_jax.evaluation._plots import plot_depths, plot_exits
from looplm_jax.evaluation._reports import depth_table, exit_table
from looplm_jax.files import pasted
from looplm_jax.loading import Loaded, load
from looplm_jax.printing import complain, show
from looplm_jax.sharding import require_compilation, use_mesh


def run_evaluation(arguments: argparse.Namespace) -> int:
    """Runs `looplm evaluate` with its arguments. Returns the exit status."""
    require_compilation()
    loaded = load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype)
    for warning in loaded.warnings:
        complain(str(warning))

    out = Path(arguments.out) if arguments.out else default_out(arguments.checkpoint, loaded.step)
    data = _data(loaded.recipe.data_of(loaded.recipe.stages[-1]), arguments)
    batches = _batches(loaded, data, arguments.sequences or loaded.recipe.evaluation.sequences)
    evaluation = _measure(loaded, batches, arguments.max_loops)

    console = Console(highlight=False)
    console.print(depth_table(evaluation.depths).rich())
    console.print(exit_table(evaluation.exits).rich())
    fixed, q_exit = evaluation.exits.fixed, evaluation.exits.q_exit
    print(f"mean loss over all budgets of loops: fixed depth {fixed.area:.4f}, Q-exit {q_exit.area:.4f} nats/token")

    about = {"step": loaded.step, "data": codec.to_dict(data), "sequences": batches.num_sequences}
    written = _write(out, evaluation, about)
    show(f"wrote {', '.join(written)} to {out}")
    best = evaluation.depths.best_loops
    show(f"next: looplm generate {pasted(arguments.checkpoint)} --prompt 'Once' --exit loops={best}")
    return 0


def default_out(checkpoint: str, step: int) -> Path:
    """Returns the folder of a run's evaluations. Raises UserError for a checkpoint that is not on a local disk."""
    if "://" in checkpoint:
        raise UserError(f"say with --out where to write the evaluation of {checkpoint}")
    path = Path(checkpoint)
    # The checkpoint may be a run folder, its `checkpoints` folder, or one step.
    run = next((folder.parent for folder in (path, path.parent) if folder.name == "checkpoints"), path)
    return run / "evaluation" / f"step_{step}"


def _data(data: DataConfig, arguments: argparse.Namespace) -> DataConfig:
    """Returns the data configuration with the changes of the arguments."""
    changes: dict[str, Any] = {}
    if arguments.data is not None:
        changes["sources"] = sources_like([arguments.data], data.sources)
    if arguments.validation_fraction is not None:
        changes["validation_fraction"] = arguments.validation_fraction
    return dataclasses.replace(data, **changes)


def _batches(loaded: Loaded, data: DataConfig, sequences: int) -> ValidationBatches:
    """Returns held-out sequences of the last stage's length, in batches the size of one of its microbatches."""
    stage = loaded.recipe.stages[-1]
    return validation_batches(
        data,
        loaded.need_tokenizer(),
        # A microbatch fits into memory, because training used it.
        batch_size=min(stage.batch_size // stage.accumulation, sequences),
        sequence_length=stage.sequence_length,
        max_sequences=sequences,
    )


def _measure(loaded: Loaded, batches: ValidationBatches, max_loops: int | None) -> Evaluation:
    """Evaluates the model behind a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    with progress, use_mesh(loaded.mesh):  # TPU kernels need the mesh
        task = progress.add_task(f"evaluating step {loaded.step}", total=len(batches))
        return evaluate(
            loaded.model,
            loaded.params,
            batches,
            max_loops=max_loops,
            on_batch=lambda: progress.advance(task),
        )


def _write(out: Path, evaluation: Evaluation, about: dict[str, Any]) -> list[str]:
    """Writes the numbers, and figures if matplotlib is installed. Returns the names of the files."""
    out.mkdir(parents=True, exist_ok=True)
    content = strict_json.dumps({**about, **evaluation.to_json()}, indent=2)
    (out / "evaluation.json").write_text(content + "\n", encoding="utf-8")

    try:
        plot_depths({"this model": evaluation.depths}, out / "depth.png")
        plot_exits({"fixed depth": evaluation.exits.fixed, "Q-exit": evaluation.exits.q_exit}, out / "exit.png")
    except UserError as error:
        complain(str(error))
        return ["evaluation.json"]
    return ["evaluation.json", "depth.png", "exit.png"]
