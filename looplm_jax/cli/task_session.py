"""Runs `looplm evaluate --tasks`: loads the model, runs the tasks, prints, and writes."""

import argparse
import itertools
import logging
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from looplm_jax import strict_json
from looplm_jax.cli.evaluation_session import default_out
from looplm_jax.errors import UserError
from looplm_jax.evaluation.harness import require_lm_eval
from looplm_jax.evaluation.harness._settings import Settings, exit_policy
from looplm_jax.loading import Loaded, load
from looplm_jax.printing import Table, complain, show
from looplm_jax.sharding import require_compilation

_QUIET = {"TQDM_DISABLE": "1", "DISABLE_MULTIPROC": "1"}  # no progress bars, and no fork of a process that runs JAX


def run_task_evaluation(arguments: argparse.Namespace) -> int:
    """Runs `looplm evaluate --tasks` with its arguments. Returns the exit status."""
    require_compilation()
    # Mistakes are reported before lm_eval is imported, which takes seconds.
    settings = _settings(arguments)
    names = _task_names(arguments)
    _prepare_lm_eval()

    loaded = load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype)
    for warning in loaded.warnings:
        complain(str(warning))

    out = Path(arguments.out) if arguments.out else default_out(arguments.checkpoint, loaded.step)
    with Console(stderr=True).status("finding the tasks") as status:
        run = _sweep if arguments.depth_sweep else _evaluate
        table, found = run(loaded, settings, names, arguments, status)

    Console(highlight=False).print(table.rich())
    if "mean_loops" in found:
        print(f"mean loops of a token: {found['mean_loops']:.2f}")

    about = {"step": loaded.step, "limit": arguments.limit, "num_fewshot": arguments.num_fewshot}
    show(f"wrote {_write(out, {**about, **found})}")
    show(f"next: {_next_command(arguments)}")
    return 0


# Arguments


def _settings(arguments: argparse.Namespace) -> Settings:
    """Returns the settings that the arguments give."""
    given = {name: getattr(arguments, name) for name in ("batch_size", "max_length", "add_bos_token", "special_tokens")}
    policy = exit_policy(loops=arguments.loops, rule=arguments.exit)
    return Settings(policy=policy, **{name: value for name, value in given.items() if value is not None})


def _task_names(arguments: argparse.Namespace) -> list[str]:
    """Returns the names of the tasks. Raises UserError if there are none."""
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task; give for example --tasks looplm_smoke")

    if arguments.include_path is not None and not Path(arguments.include_path).is_dir():
        raise UserError(f"--include-path {arguments.include_path} is not a folder")
    return names


def _prepare_lm_eval() -> None:
    """Configures lm_eval before its import, which reads the environment."""
    for name, value in _QUIET.items():
        # The user's own settings are kept.
        os.environ.setdefault(name, value)
    require_lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


# Running the tasks


def _evaluate(
    loaded: Loaded, settings: Settings, names: list[str], arguments: argparse.Namespace, status: Status
) -> tuple[Table, dict[str, Any]]:
    """Runs the tasks at one number of loops, or under one exit policy."""
    from looplm_jax.evaluation.harness._adapter import LoopLMAdapter
    from looplm_jax.evaluation.harness._running import choose_tasks, run_tasks, task_table

    chosen = choose_tasks(names, include_path=arguments.include_path)
    adapter = LoopLMAdapter(loaded, settings, on_requests=_counter(status))
    run = run_tasks(adapter, chosen, limit=arguments.limit, num_fewshot=arguments.num_fewshot)

    rule = arguments.exit or f"loops={arguments.loops or loaded.model.config.loops}"
    table = task_table(run, f"tasks, --exit {rule}")
    return table, {"exit": rule, "mean_loops": adapter.mean_loops, **run.results}


def _sweep(
    loaded: Loaded, settings: Settings, names: list[str], arguments: argparse.Namespace, status: Status
) -> tuple[Table, dict[str, Any]]:
    """Runs the tasks at every number of loops."""
    from looplm_jax.evaluation.harness._adapter import EveryDepth
    from looplm_jax.evaluation.harness._running import choose_tasks, sweep_table, sweep_tasks

    chosen = choose_tasks(names, include_path=arguments.include_path)
    loops = arguments.max_loops or 2 * loaded.model.config.loops
    adapter = EveryDepth(loaded, settings, loops=loops, on_requests=_counter(status))
    runs = sweep_tasks(adapter, chosen, loops=loops, limit=arguments.limit, num_fewshot=arguments.num_fewshot)

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


# After the run


def _write(out: Path, content: dict[str, Any]) -> Path:
    """Writes a new file for each evaluation: tasks.json, tasks-2.json and so on. Returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    paths = (out / f"tasks{f'-{number}' if number > 1 else ''}.json" for number in itertools.count(1))
    path = next(path for path in paths if not path.exists())
    path.write_text(strict_json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    return path


def _next_command(arguments: argparse.Namespace) -> str:
    """Returns the command for the same tasks with the other kind of evaluation, for comparison."""
    words = ["looplm", "evaluate", arguments.checkpoint, "--tasks", arguments.tasks]
    words += ["--include-path", arguments.include_path] if arguments.include_path else []
    words += ["--limit", str(arguments.limit)] if arguments.limit else []
    return shlex.join([*words, *(["--exit", "q=0.5"] if arguments.depth_sweep else ["--depth-sweep"])])
