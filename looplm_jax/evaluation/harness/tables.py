"""Tables of task scores."""

from collections.abc import Sequence

from looplm_jax.evaluation.harness.running import TaskRun
from looplm_jax.evaluation.tables import Table


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
        for scores in zip(*(run.scores for run in runs), strict=True)
    ]
    depths = [f"{depth} (trained)" if depth == trained_loops else str(depth) for depth in range(1, len(runs) + 1)]
    return Table(title="tasks at every number of loops", columns=("task", "metric", *depths), rows=rows)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
