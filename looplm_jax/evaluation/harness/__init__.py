"""An adapter for EleutherAI's lm-evaluation-harness: its tasks, at any number of loops or under any exit policy.

    looplm evaluate runs/text-small --tasks arc_easy,wikitext --exit q=0.5
    python -m looplm_jax.evaluation.harness run --model looplm --model_args checkpoint=runs/text-small exit=q=0.5 ...

The second command is the harness's own command line. It finds models of other packages only if they register
themselves, so it is started through this package. In Python:

    from looplm_jax.evaluation.harness import LoopLMAdapter, HarnessSettings, choose_tasks, run_tasks

    adapter = LoopLMAdapter(looplm_jax.load("runs/text-small"), HarnessSettings())
    for score in run_tasks(adapter, choose_tasks(["looplm_smoke"])).scores:
        print(score.task, score.metric, score.value)

Models: a `LoopLMAdapter` answers the harness under `HarnessSettings`, and `EveryDepth` answers for all depths from one
forward pass.

Tasks: `choose_tasks` selects `ChosenTasks` by name. `run_tasks` returns a `TaskRun` with a `TaskScore` for each number,
and `sweep_tasks` one for each depth. `task_table` and `sweep_table` show them. `TASKS` is a folder with small tasks
that need no network, whose documents `load_documents` reads.

All of these need the optional package `lm_eval`; `require_lm_eval` raises UserError if it is missing.
"""

import json
from pathlib import Path
from typing import Any

from etils import epy

from looplm_jax.errors import UserError

with epy.lazy_api_imports(globals()):
    # isort: off
    # Models.
    from looplm_jax.evaluation.harness._adapter import EveryDepth, LoopLMAdapter
    from looplm_jax.evaluation.harness._settings import HarnessSettings

    # Tasks.
    from looplm_jax.evaluation.harness._running import ChosenTasks, choose_tasks, run_tasks, sweep_tasks
    from looplm_jax.evaluation.harness._running import TaskRun, TaskScore, sweep_table, task_table

TASKS = Path(__file__).parent.parent / "tasks"  # tasks that need no network

__all__ = [
    "TASKS",
    "ChosenTasks",
    "EveryDepth",
    "HarnessSettings",
    "LoopLMAdapter",
    "TaskRun",
    "TaskScore",
    "choose_tasks",
    "load_documents",
    "require_lm_eval",
    "run_tasks",
    "sweep_table",
    "sweep_tasks",
    "task_table",
]


def require_lm_eval() -> None:
    """Raises UserError if the optional package lm_eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("tasks need lm_eval; pip install 'looplm_jax[eval]'") from None


def load_documents(*, documents: str, **metadata: Any) -> dict[str, Any]:
    """Returns the split `test` of a JSON Lines file of `TASKS`, in the form that the harness expects.

    The YAML files of the tasks name this function as their `custom_dataset`.
    """
    import datasets

    del metadata  # metadata of the task and of the model
    lines = (TASKS / documents).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
