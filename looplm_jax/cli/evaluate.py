"""The work of `looplm evaluate`, on held-out documents or on tasks: loads, measures, prints, and writes."""

import dataclasses
import itertools
import logging
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from looplm_jax import codec, json_io
from looplm_jax.config import DataConfig, sources_like
from looplm_jax.data import ValidationBatches, validation_batches
from looplm_jax.errors import UserError
from looplm_jax.evaluation._buckets import bucket_scores, bucket_table
from looplm_jax.evaluation._evaluate import Evaluation, evaluate
from looplm_jax.evaluation._plots import plot_depths, plot_exits
from looplm_jax.evaluation._reports import depth_table, exit_table
from looplm_jax.evaluation.harness import require_lm_eval
from looplm_jax.evaluation.harness._settings import HarnessSettings, exit_policy
from looplm_jax.files import quoted
from looplm_jax.loading import Loaded, load
from looplm_jax.sharding import require_compilation, use_mesh
from looplm_jax.terminal import Table, print_error, show

_QUIET = {"TQDM_DISABLE": "1", "DISABLE_MULTIPROC": "1"}  # no progress bars, and no fork of a process that runs JAX


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of every evaluation, as the flags give them."""

    checkpoint: str
    step: int | None
    dtype: str | None
    out: str | None
    max_loops: int | None


def load_evaluated(options: EvaluationOptions) -> tuple[Loaded, Path]:
    """Returns the model and the folder for its results. Prints the warnings of the checkpoint."""
    loaded = load(options.checkpoint, step=options.step, dtype=options.dtype)
    for warning in loaded.warnings:
        print_error(str(warning))
    return loaded, Path(options.out) if options.out else _default_out(options.checkpoint, loaded.step)


def _default_out(checkpoint: str, step: int) -> Path:
    """Returns the folder of a run's evaluations. Raises UserError for a checkpoint that is not on a local disk."""
    if "://" in checkpoint:
        raise UserError(f"say with --out where to write the evaluation of {checkpoint}")
    path = Path(checkpoint)
    # The checkpoint may be a run folder, its `checkpoints` folder, or one step.
    run = next((folder.parent for folder in (path, path.parent) if folder.name == "checkpoints"), path)
    return run / "evaluation" / f"step_{step}"


# Held-out documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutOptions(EvaluationOptions):
    """The options of an evaluation on held-out documents."""

    sequences: int | None
    data: str | None
    validation_fraction: float | None
    buckets: str | None


def evaluate_held_out_documents(options: HeldOutOptions) -> int:
    """Measures the loss at every depth and against mean loops. Returns the exit status."""
    require_compilation()
    loaded, out = load_evaluated(options)
    # What the model was trained on last.
    data = _data(loaded.recipe.data_of(loaded.recipe.stages[-1]), options)
    batches = _batches(loaded, data, options.sequences or loaded.recipe.evaluation.sequences)
    if options.buckets is not None:
        return _evaluate_buckets(loaded, batches, options, out)

    evaluation = _measure(loaded, batches, options.max_loops)

    console = Console(highlight=False)
    console.print(depth_table(evaluation.depths).rich())
    console.print(exit_table(evaluation.exits).rich())
    fixed, q_exit = evaluation.exits.fixed, evaluation.exits.q_exit
    print(f"mean loss over all budgets of loops: fixed depth {fixed.area:.4f}, Q-exit {q_exit.area:.4f} nats/token")

    about = {"step": loaded.step, "data": codec.to_dict(data), "sequences": batches.num_sequences}
    written = _write(out, evaluation, about)
    show(f"wrote {', '.join(written)} to {out}")

    best = evaluation.depths.best_loops
    show(f"next: looplm generate {quoted(options.checkpoint)} --prompt 'Once' --exit loops={best}")
    return 0


def _evaluate_buckets(loaded: Loaded, batches: ValidationBatches, options: HeldOutOptions, out: Path) -> int:
    """Measures the accuracy on easy, medium and hard tokens of a base model. Returns the exit status."""
    assert options.buckets is not None
    base = load(options.buckets, step=None, dtype=options.dtype)
    if base.need_tokenizer().fingerprint != loaded.need_tokenizer().fingerprint:
        raise UserError(f"{options.buckets} has another tokenizer than {options.checkpoint}; give the model it is from")

    with _progress() as progress, use_mesh(loaded.mesh):
        task = progress.add_task(f"evaluating step {loaded.step}", total=len(batches))
        scores = bucket_scores(
            loaded.model,
            loaded.params,
            base.model,
            base.params,
            batches,
            on_batch=lambda: progress.advance(task),
        )

    Console(highlight=False).print(
        bucket_table(scores, title=f"held-out tokens by the entropy of {options.buckets}").rich()
    )
    out.mkdir(parents=True, exist_ok=True)
    content = {"step": loaded.step, "base": options.buckets, "buckets": [dataclasses.asdict(own) for own in scores]}
    (out / "buckets.json").write_text(json_io.dumps(content, indent=2) + "\n", encoding="utf-8")
    show(f"wrote {out / 'buckets.json'}")
    return 0


def _data(data: DataConfig, options: HeldOutOptions) -> DataConfig:
    """Returns the data configuration with the changes of the options."""
    changes: dict[str, Any] = {}
    if options.data is not None:
        changes["sources"] = sources_like([options.data], data.sources)
    if options.validation_fraction is not None:
        changes["validation_fraction"] = options.validation_fraction
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
    with _progress() as progress, use_mesh(loaded.mesh):  # TPU kernels need the mesh
        task = progress.add_task(f"evaluating step {loaded.step}", total=len(batches))
        return evaluate(
            loaded.model,
            loaded.params,
            batches,
            max_loops=max_loops,
            on_batch=lambda: progress.advance(task),
        )


def _progress() -> Progress:
    """Returns a progress bar on standard error, so that results can be redirected to a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _write(out: Path, evaluation: Evaluation, about: dict[str, Any]) -> list[str]:
    """Writes the numbers, and figures if matplotlib is installed. Returns the names of the files."""
    out.mkdir(parents=True, exist_ok=True)
    content = json_io.dumps({**about, **evaluation.to_json()}, indent=2)
    (out / "evaluation.json").write_text(content + "\n", encoding="utf-8")

    # Figures need matplotlib, which is optional. The numbers are written in any case.
    try:
        plot_depths({"this model": evaluation.depths}, out / "depth.png")
        plot_exits({"fixed depth": evaluation.exits.fixed, "Q-exit": evaluation.exits.q_exit}, out / "exit.png")
    except UserError as error:
        print_error(str(error))
        return ["evaluation.json"]
    return ["evaluation.json", "depth.png", "exit.png"]


# Tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions(EvaluationOptions):
    """The options of an evaluation on tasks of lm-evaluation-harness."""

    tasks: str
    exit: str | None
    loops: int | None
    depth_sweep: bool | None
    limit: int | None
    num_fewshot: int | None
    include_path: str | None
    batch_size: int | None
    max_length: int | None
    add_bos_token: bool | None
    special_tokens: bool | None


def evaluate_tasks(options: TaskOptions) -> int:
    """Runs the tasks at one depth, under an exit policy, or at every depth. Returns the exit status."""
    require_compilation()
    # Mistakes are reported before lm_eval is imported, which takes seconds.
    settings = _settings(options)
    names = _task_names(options)
    _prepare_lm_eval()

    loaded, out = load_evaluated(options)
    with Console(stderr=True).status("finding the tasks") as status:
        run = _sweep if options.depth_sweep else _evaluate
        table, found = run(loaded, settings, names, options, status)

    Console(highlight=False).print(table.rich())
    if "mean_loops" in found:
        print(f"mean loops of a token: {found['mean_loops']:.2f}")

    about = {"step": loaded.step, "limit": options.limit, "num_fewshot": options.num_fewshot}
    show(f"wrote {_write_results(out, {**about, **found})}")
    show(f"next: {_next_command(options)}")
    return 0


def _settings(options: TaskOptions) -> HarnessSettings:
    """Returns the settings that the options give."""
    # Only what was given, so that the defaults stay in one place.
    given = {name: getattr(options, name) for name in ("batch_size", "max_length", "add_bos_token", "special_tokens")}
    policy = exit_policy(loops=options.loops, rule=options.exit)
    return HarnessSettings(policy=policy, **{name: value for name, value in given.items() if value is not None})


def _task_names(options: TaskOptions) -> list[str]:
    """Returns the names of the tasks. Raises UserError if there are none."""
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task; give for example --tasks looplm_smoke")

    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path {options.include_path} is not a folder")
    return names


def _prepare_lm_eval() -> None:
    """Configures lm_eval before its import, which reads the environment."""
    for name, value in _QUIET.items():
        # The user's own settings are kept.
        os.environ.setdefault(name, value)
    require_lm_eval()
    # Its notes would be mixed with the output of this command.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _evaluate(
    loaded: Loaded, settings: HarnessSettings, names: list[str], options: TaskOptions, status: Status
) -> tuple[Table, dict[str, Any]]:
    """Runs the tasks at one number of loops, or under one exit policy."""
    from looplm_jax.evaluation.harness._adapter import LoopLMAdapter
    from looplm_jax.evaluation.harness._running import choose_tasks, run_tasks, task_table

    chosen = choose_tasks(names, include_path=options.include_path)
    adapter = LoopLMAdapter(loaded, settings, on_requests=_counter(status))
    run = run_tasks(adapter, chosen, limit=options.limit, num_fewshot=options.num_fewshot)

    rule = options.exit or f"loops={options.loops or loaded.model.config.loops}"
    table = task_table(run, f"tasks, --exit {rule}")
    return table, {"exit": rule, "mean_loops": adapter.mean_loops, **run.results}


def _sweep(
    loaded: Loaded, settings: HarnessSettings, names: list[str], options: TaskOptions, status: Status
) -> tuple[Table, dict[str, Any]]:
    """Runs the tasks at every number of loops."""
    from looplm_jax.evaluation.harness._adapter import EveryDepth
    from looplm_jax.evaluation.harness._running import choose_tasks, sweep_table, sweep_tasks

    chosen = choose_tasks(names, include_path=options.include_path)
    # Twice the trained depth, as on held-out documents, shows whether more loops still help.
    loops = options.max_loops or loaded.model.config.deeper_loops
    adapter = EveryDepth(loaded, settings, loops=loops, on_requests=_counter(status))
    runs = sweep_tasks(adapter, chosen, loops=loops, limit=options.limit, num_fewshot=options.num_fewshot)

    trained = loaded.model.config.loops
    return sweep_table(runs, trained_loops=trained), {
        "trained_loops": trained,
        "depths": {depth: run.results for depth, run in enumerate(runs, 1)},
    }


def _counter(status: Status) -> Callable[[int], None]:
    """Returns a callback that shows how many requests were scored."""
    scored = 0

    def count(requests: int) -> None:
        nonlocal scored
        scored += requests
        status.update(f"{scored:,} requests scored")

    return count


def _write_results(out: Path, content: dict[str, Any]) -> Path:
    """Writes a new file for each evaluation: tasks.json, tasks-2.json and so on. Returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    paths = (out / f"tasks{f'-{number}' if number > 1 else ''}.json" for number in itertools.count(1))
    path = next(path for path in paths if not path.exists())
    path.write_text(json_io.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    return path


def _next_command(options: TaskOptions) -> str:
    """Returns the command for the same tasks with the other kind of evaluation, for comparison."""
    words = ["looplm", "evaluate", options.checkpoint, "--tasks", options.tasks]
    words += ["--include-path", options.include_path] if options.include_path else []
    words += ["--limit", str(options.limit)] if options.limit else []
    return shlex.join([*words, *(["--exit", "q=0.5"] if options.depth_sweep else ["--depth-sweep"])])
