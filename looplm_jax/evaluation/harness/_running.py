"""Runs tasks of lm-evaluation-harness on an adapter, or at every depth of one."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from looplm_jax.errors import UserError, suggest
from looplm_jax.evaluation.harness import TASKS
from looplm_jax.evaluation.harness._adapter import EveryDepth, LoopLMAdapter
from looplm_jax.terminal import Table

_BOOTSTRAPS = 1000  # resamples for the standard error of a metric that is not a mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One number that a task reports. `stderr` is None if the harness does not compute one."""

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRun:
    """The report of the harness: its own dictionary, without samples."""

    results: dict[str, Any]

    @property
    def scores(self) -> tuple[TaskScore, ...]:
        """Returns every number, with tasks and metrics in the harness's order."""
        return tuple(
            _score(task, key, metrics) for task, metrics in self.results["results"].items() for key in _metrics(metrics)
        )


class ChosenTasks(TaskManager):
    """Tasks selected by name. They are loaded once and may run several times."""

    def __init__(self, names: Sequence[str], **options: Any):
        super().__init__(**options)
        self.names = list(names)
        self._tasks: Any = None

    def load(self, task_list: Any) -> Any:
        """Returns all tasks. `task_list` matters only in the first call, and the harness always passes `names`."""
        if self._tasks is None:
            self._tasks = super().load(task_list)
        return self._tasks


def choose_tasks(names: Sequence[str], *, include_path: str | None = None) -> ChosenTasks:
    """Selects tasks and groups of tasks by name, or by patterns with `*`.

    Args:
      names: names of tasks from this package, from `lm_eval`, or from `include_path`.
      include_path: a folder with YAML files of other tasks.

    Raises:
      UserError: a name is not known, or a task cannot be loaded, for example because its data cannot be downloaded.
    """
    # The harness's own tasks are indexed only if a name requires them.
    chosen = ChosenTasks(names, include_defaults=False, include_path=str(TASKS))
    if include_path is not None or not all(map(chosen.match_tasks, ([name] for name in names))):
        folders = [str(TASKS), *([] if include_path is None else [include_path])]
        chosen = ChosenTasks(names, include_path=folders)

    chosen.names = list(dict.fromkeys(found for name in names for found in _matches(name, chosen.all_tasks)))
    try:
        chosen.load(chosen.names)
    # Loading a task runs its own code and downloads, so any exception is possible.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load {', '.join(names)}: {type(error).__name__}: {reason}") from error
    return chosen


def run_tasks(
    adapter: LoopLMAdapter, chosen: ChosenTasks, *, limit: int | None = None, num_fewshot: int | None = None
) -> TaskRun:
    """Runs the tasks on the first `limit` documents of each, or on all.

    Raises:
      UserError: the model cannot serve a request.
    """
    # Samples are left out of the report: they would repeat the texts of the task.
    results = simple_evaluate(
        model=adapter,
        tasks=chosen.names,
        task_manager=chosen,
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=False,
    )
    return TaskRun(results={name: results[name] for name in ("results", "n-samples", "n-shot", "versions")})


def sweep_tasks(
    adapter: EveryDepth, chosen: ChosenTasks, *, loops: int, limit: int | None = None, num_fewshot: int | None = None
) -> list[TaskRun]:
    """Runs the tasks at loops 1..`loops`, with the same few-shot examples at each depth."""
    runs = []
    # The harness seeds its random choices in every run, so the examples are the same.
    for depth in range(1, loops + 1):
        adapter.depth = depth
        runs.append(run_tasks(adapter, chosen, limit=limit, num_fewshot=num_fewshot))
    return runs


def _matches(name: str, known: Iterable[str]) -> list[str]:
    """Returns the tasks that match a name or a pattern. Raises UserError if there are none."""
    matches = fnmatch.filter(known, name)
    if not matches:
        raise UserError(f"unknown task {name!r}{suggest(name, known, '; `lm_eval ls tasks` lists them')}")
    return matches


def _metrics(metrics: dict[str, Any]) -> list[str]:
    """Returns the keys of the values; each is "metric,filter", next to "metric_stderr,filter"."""
    # Other keys are names and settings.
    return [key for key in metrics if "," in key and "_stderr," not in key]


def _score(task: str, key: str, metrics: dict[str, Any]) -> TaskScore:
    """Returns one number with its standard error."""
    metric, filter_name = key.split(",", 1)
    stderr = metrics.get(f"{metric}_stderr,{filter_name}")
    return TaskScore(
        task=task,
        metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
        value=float(metrics[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
    )


# Tables of scores


def task_table(run: TaskRun, title: str) -> Table:
    """Returns a table with one row per number."""
    rows = [
        [score.task, score.metric, _number(score.value), "" if score.stderr is None else _number(score.stderr)]
        for score in run.scores
    ]
    return Table(title=title, columns=("task", "metric", "value", "± stderr"), rows=rows)


def sweep_table(runs: Sequence[TaskRun], *, trained_loops: int) -> Table:
    """Returns a table with one row per number and one column per depth, from 1 up."""
    rows = [
        [scores[0].task, scores[0].metric, *(_number(score.value) for score in scores)]
        # Every run has the same tasks, so their numbers are in the same order.
        for scores in zip(*(run.scores for run in runs), strict=True)
    ]
    depths = [f"{depth} (trained)" if depth == trained_loops else str(depth) for depth in range(1, len(runs) + 1)]
    return Table(title="tasks at every number of loops", columns=("task", "metric", *depths), rows=rows)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
