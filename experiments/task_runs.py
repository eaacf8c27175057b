"""Runs on synthetic tasks: k layers looped T times, trained on a task, tested on problems that training never saw."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.run_speed import run_speed
from looplm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    Objective,
    OptimizerConfig,
    Recipe,
    Schedule,
    SourceConfig,
    Stage,
)
from looplm_jax.data.tasks import make_task
from looplm_jax.evaluation import commonest_answer, task_accuracy
from looplm_jax.loading import load
from looplm_jax.training._metrics import TRAIN, read_metrics
from looplm_jax.training._stopping import Stopped
from looplm_jax.training.run import train

# Small models learn in jumps, up as well as down, at learning rates too high for large ones, so no spike is skipped.
_NO_SPIKES = GuardConfig(sigma=1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One cell of a grid. `tests` are tasks of the same vocabulary, by name."""

    task: str
    tests: Mapping[str, str]
    layers: int
    loops: int
    width: int
    heads: int
    steps: int
    batch_size: int  # packed sequences
    sequence_length: int
    learning_rate: float
    seed: int
    mlp_width: int = 0  # 0: 8/3 of the width, rounded to a multiple of 16
    beta: float = 0.1
    last_loop_only: bool = False  # use the loss after the last loop alone instead of Eq. 4
    b2: float = 0.98
    weight_decay: float = 0.1
    warmup_steps: int = 0
    final_share: float = 0.1  # fraction of the peak learning rate at the end of the cosine
    rope_theta: float = 1e4
    init_std: float = 0.02
    test_items: int = 1024

    @property
    def shape(self) -> str:
        """Returns the shape as `k⊗T`, as in the tables."""
        return f"{self.layers}⊗{self.loops}"

    def recipe(self) -> Recipe:
        """Returns the recipe of the run."""
        task = make_task(self.task)
        return Recipe(
            name="task-run",
            seed=self.seed,
            model=ModelConfig(
                vocab_size=task.tokenizer.vocab_size,
                width=self.width,
                mlp_width=self.mlp_width or round(self.width * 8 / 3 / 16) * 16,
                num_layers=self.layers,
                num_heads=self.heads,
                loops=self.loops,
                rope_theta=self.rope_theta,
                max_positions=self.sequence_length,
                init_std=self.init_std,
            ),
            stages=(
                Stage(
                    name="train",
                    steps=self.steps,
                    batch_size=self.batch_size,
                    sequence_length=self.sequence_length,
                    loops=self.loops,
                    objective=Objective.LAST_LOSS if self.last_loop_only else Objective.EXPECTED_LOSS,
                    # A single exit has no entropy.
                    beta=self.beta if self.loops > 1 else 0.0,
                    learning_rate=self.learning_rate,
                    schedule=Schedule.COSINE,
                    warmup_steps=self.warmup_steps,
                    final_learning_rate=self.final_share * self.learning_rate,
                ),
            ),
            mesh=MeshConfig(data=1),
            optimizer=OptimizerConfig(b2=self.b2, eps=1e-6, weight_decay=self.weight_decay),
            data=DataConfig(sources=(SourceConfig(path=self.task),), seed=self.seed),
            guard=_NO_SPIKES,
            # Ten saves per run, and about a hundred logged steps.
            checkpoint=CheckpointConfig(every=max(self.steps // 10, 1), keep=1),
            evaluation=EvaluationConfig(sequences=1),
            log_every=max(self.steps // 100, 1),
        )


def run_task(run: TaskRun, folder: Path, console: Console) -> dict[str, Any]:
    """Trains, or resumes training, and tests at every depth up to twice the trained one.

    Returns:
      shape; accuracy: by test, after each loop; at_trained_depth: by test, after the last trained loop; commonest: by
        test,
      the fraction of the most common answer, which is the accuracy of a constant; curve: step and training loss;
        parameters:
      their number; and the speed of training from `run_speed`.

    Raises:
      Stopped: a signal arrived; calling again resumes.
    """
    outcome = train(run.recipe(), folder, console=console)
    if outcome.stopped_by is not None:
        raise Stopped(outcome.stopped_by)

    loaded = load(folder)
    depth = 2 * run.loops
    tasks = {name: make_task(spec) for name, spec in run.tests.items()}
    accuracy = {
        name: task_accuracy(
            loaded.model, loaded.params, task, loops=depth, items=run.test_items, batch_size=128
        ).tolist()
        for name, task in tasks.items()
    }

    steps = [row for row in read_metrics(folder) if row["kind"] == TRAIN]
    return {
        "shape": run.shape,
        "accuracy": accuracy,
        "at_trained_depth": {name: values[run.loops - 1] for name, values in accuracy.items()},
        "commonest": {name: commonest_answer(task, run.test_items) for name, task in tasks.items()},
        "curve": [[row["step"], row["loss"]] for row in steps],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
        **run_speed(folder),
    }
