"""Runs of Capo: k layers looped T times read about N people; the result is the knowledge in bits per parameter."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.run_speed import run_speed
from looplm_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    NormPlacement,
    OptimizerConfig,
    PriorConfig,
    PriorKind,
    Recipe,
    Remat,
    Schedule,
    SourceConfig,
    Stage,
)
from looplm_jax.data import ValidationBatches
from looplm_jax.data.tasks import Capo
from looplm_jax.evaluation import bits_per_parameter, knowledge_loss, most_bits_per_parameter
from looplm_jax.models.looplm import LoopLM, Params, count_params
from looplm_jax.training._metrics import EVALUATION, TRAIN, read_metrics
from looplm_jax.training._stopping import Stopped
from looplm_jax.training.run import train

_MEASUREMENTS = 8  # over training; they take a few hundredths of its time


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapoRun:
    """One cell of the grid. An exposure is one biography of every person.

    With the default prior, all but 0.06 of the loss is that after the last loop.
    """

    people: int
    exposures: int
    layers: int
    loops: int
    width: int
    heads: int
    batch_size: int  # packed sequences
    sequence_length: int
    learning_rate: float
    seed: int = 0
    warmup_steps: int = 0
    beta: float = 1.0
    prior_mean: float = 50.0  # loops
    init_std: float = 0.02
    remat: str = "none"

    @property
    def shape(self) -> str:
        """Returns the shape as `k⊗T`, as in the tables."""
        return f"{self.layers}⊗{self.loops}"

    @property
    def name(self) -> str:
        """Returns the name of the cell."""
        return f"N{self.people}-{self.layers}x{self.loops}-w{self.width}-seed{self.seed}"

    @functools.cached_property
    def task(self) -> Capo:
        """Returns the task with its people, which are the same for all shapes of a seed."""
        return Capo(people=self.people, world=self.seed)

    @property
    def steps(self) -> int:
        """Returns the steps for the exposures, as if sequences could split biographies; see `exposures_of`."""
        # A biography of n tokens has n - 1 targets.
        positions = self.exposures * self.people * (self.task.mean_tokens - 1)
        return math.ceil(positions / (self.batch_size * self.sequence_length))

    def exposures_of(self, targets: float) -> float:
        """Returns the number of exposures in a number of targets."""
        return targets / (self.people * (self.task.mean_tokens - 1))

    def recipe(self) -> Recipe:
        """Returns the recipe of the run."""
        return Recipe(
            name="capo",
            seed=self.seed,
            model=ModelConfig(
                vocab_size=self.task.tokenizer.vocab_size,
                width=self.width,
                # SwiGLU has three matrices: at 8/3 of the width it is as large as a plain network at 4.
                mlp_width=round(self.width * 8 / 3 / 16) * 16,
                num_layers=self.layers,
                num_heads=self.heads,
                loops=self.loops,
                norm_placement=NormPlacement.PRE,
                tied_head=True,
                rope_theta=1e4,
                max_positions=self.sequence_length,
                init_std=self.init_std,
            ),
            stages=(self._stage(),),
            compute=ComputeConfig(remat=Remat(self.remat)),
            mesh=MeshConfig(data=1),
            optimizer=OptimizerConfig(b2=0.98, eps=1e-6, weight_decay=0.02),
            data=DataConfig(
                sources=(SourceConfig(path=f"capo:people={self.people},world={self.seed}"),), seed=self.seed
            ),
            checkpoint=CheckpointConfig(every=math.ceil(self.steps / 4), keep=1),
            evaluation=EvaluationConfig(every=math.ceil(self.steps / _MEASUREMENTS), sequences=1),
            log_every=max(self.steps // 100, 1),
        )

    def _stage(self) -> Stage:
        """Returns the only stage. A plain model has a single exit, so its entropy weight is 0."""
        return Stage(
            name="train",
            steps=self.steps,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            loops=self.loops,
            beta=self.beta if self.loops > 1 else 0.0,
            prior=PriorConfig(kind=PriorKind.POISSON_LOG_NORMAL, mean=self.prior_mean, sigma=0.01),
            learning_rate=self.learning_rate,
            schedule=Schedule.COSINE,
            warmup_steps=self.warmup_steps,
            final_learning_rate=0.1 * self.learning_rate,
        )


def run_capo(run: CapoRun, folder: Path, console: Console) -> dict[str, Any]:
    """Trains, or resumes training, and measures the knowledge at every depth up to twice the trained one.

    Returns:
      shape, people, parameters; exposures: their actual number; bits: bits per parameter after each loop, and
      at_trained_depth; most: R_max; name and value: nats per person after each loop; curve: exposures, and bits per
      parameter at that time after the last trained loop; and the speed of training from `run_speed`.

    Raises:
      Stopped: a signal arrived; calling again resumes.
    """
    outcome = train(run.recipe(), folder, evaluate=functools.partial(_measure, run), console=console)
    if outcome.stopped_by is not None:
        raise Stopped(outcome.stopped_by)

    rows = read_metrics(folder)
    measured = [row for row in rows if row["kind"] == EVALUATION]
    # Packing decides how many targets a step has, so exposures derive from the logged counts.
    targets = statistics.fmean(row["tokens"] for row in rows if row["kind"] == TRAIN)  # targets per step
    last, parameters = measured[-1], count_params(run.recipe().model)

    return {
        "shape": run.shape,
        "people": run.people,
        "parameters": parameters,
        "exposures": run.exposures_of(targets * run.steps),
        "bits": last["bits"],
        "at_trained_depth": last["bits"][run.loops - 1],
        "most": most_bits_per_parameter(run.people, parameters),
        "name": last["name"],
        "value": last["value"],
        "curve": [[run.exposures_of(targets * row["step"]), row["bits"][run.loops - 1]] for row in measured],
        **run_speed(folder),
    }


def _measure(run: CapoRun, model: LoopLM, params: Params, held_out: ValidationBatches) -> Mapping[str, Any]:
    """Measures the knowledge. Nothing is held out: the test covers all people."""
    # Required by the interface of `evaluate`.
    del held_out
    loss = knowledge_loss(model, params, run.task, loops=2 * run.loops)
    bits = bits_per_parameter(loss, run.people, count_params(model.config))
    return {"bits": bits.tolist(), "name": loss.name.tolist(), "value": loss.value.tolist()}
