"""Capo (paper, 6.1 and B.1): looping adds no storage; bits of knowledge per parameter are the same with loops.

    python -m experiments capo --scale cpu

Models of k layers, plain or looped four times, read biographies of N synthetic people (`looplm_jax.data.tasks._capo`),
worded differently at each exposure, and are then tested on names and facts (`looplm_jax.evaluation.knowledge_loss`).
Published: about 2 bits per parameter after 1,000 exposures, with or without loops, and about 1 after 100.

Published, and used at `paper`: RoPE, tied head, heads of width 64, 512 packed positions, batch 192, AdamW (0.9, 0.98),
eps 1e-6, learning rate 1e-3, weight decay 0.02, warm-up 1,000, cosine to a tenth, 1,000 exposures, N from 20K to 500K,
1M to 40M parameters, 1 loop against 4. Not published, and so our choices:

* Depths and widths, two or three for each N, so that some models cannot hold all the knowledge; feed-forward width 8/3.
* Pre-norm layers as in GPT-2, with RMSNorm and SwiGLU as in Ouro.
* The loss: cross-entropy of all tokens, almost entirely after the last loop, as for a plain model of that depth. It is
  Eq. 4 with a prior that leaves 0.06 to the earlier loops, at weight 1.
* The order of the sentences. The pronoun counts at its first occurrence; the company's city does not count, since it
  follows from the company.
* The tokenizer is the task's own, with 315 symbols: GPT-2's 50,257 would be most of the parameters of such models.
  Pools and templates are our own text.

At `paper` the largest cell, N = 500K on 12⊗4, sees 2.8e10 tokens and takes 2.8e19 operations. At `cpu` the learning
rate and the initial matrices are larger, as a width of 32 requires, and batches are small: 2 sequences instead of 8
made little difference (0.69 against 0.64 bits at 94 exposures of 500 people), since exposures are what counts. With the
uniform prior (beta 0.1, and Ouro's four norms per layer) 2⊗4 reached 0.25 bits after 59 exposures of 500 people, where
2⊗1 reached 0.43. 2⊗4 uses half the learning rate of 2⊗1: at 1e-2 the run stopped at step 571, after ten bad steps in a
row.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments.capo_report import capo_report
from experiments.frame import Cell, Record, Report, Scale
from experiments.reporting import run_speed
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
from looplm_jax.models import LoopLM, Params, count_params
from looplm_jax.training._metrics import EVALUATION, TRAIN, read_metrics
from looplm_jax.training._stopping import Stopped
from looplm_jax.training.run import train

# Runs


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


# Grids


_LOOPS = (1, 4)
_PAPER: dict[str, Any] = {
    "batch_size": 192,
    "sequence_length": 512,
    "learning_rate": 1e-3,
    "warmup_steps": 1000,
    "exposures": 1000,
    "remat": "layer",
}


def _pair(**settings: Any) -> list[CapoRun]:
    """Returns the runs of the same model, plain and looped."""
    return [CapoRun(loops=loops, **settings) for loops in _LOOPS]


def _printed(people: int, layers: int, width: int) -> list[CapoRun]:
    """Returns the pair of a model at the published settings."""
    return _pair(people=people, layers=layers, width=width, heads=width // 64, **_PAPER)


def _on_cpu(loops: int, learning_rate: float) -> CapoRun:
    """Returns a run for two CPU cores."""
    return CapoRun(
        loops=loops,
        learning_rate=learning_rate,
        people=1200,
        exposures=180,
        layers=2,
        width=32,
        heads=2,
        batch_size=8,
        sequence_length=120,
        warmup_steps=100,
        init_std=0.1,
    )


_RUNS: Mapping[Scale, Sequence[CapoRun]] = MappingProxyType(
    {
        Scale.SMOKE: _pair(
            people=20, exposures=2, layers=1, width=16, heads=2, batch_size=16, sequence_length=64, learning_rate=1e-3
        ),
        # Different learning rates: the looped model diverges at the higher one.
        Scale.CPU: [_on_cpu(loops=1, learning_rate=1e-2), _on_cpu(loops=4, learning_rate=5e-3)],
        Scale.GPU: _pair(
            **_PAPER | {"people": 20_000, "exposures": 100, "layers": 2, "width": 128, "heads": 2, "batch_size": 32}
        ),
        Scale.PAPER: [
            *_printed(people=20_000, layers=2, width=128),
            *_printed(people=20_000, layers=4, width=128),
            *_printed(people=50_000, layers=4, width=128),
            *_printed(people=50_000, layers=4, width=192),
            *_printed(people=100_000, layers=4, width=192),
            *_printed(people=100_000, layers=4, width=256),
            *_printed(people=200_000, layers=4, width=256),
            *_printed(people=200_000, layers=6, width=320),
            *_printed(people=500_000, layers=6, width=320),
            *_printed(people=500_000, layers=8, width=448),
            *_printed(people=500_000, layers=12, width=512),
        ],
    }
)


class CapoExperiment:
    """The Capo experiment at all scales."""

    name = "capo"
    claim = "looping adds no storage: as many bits of knowledge a parameter with 4 loops as with 1"
    scales = tuple(_RUNS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per model."""
        return tuple(Cell(name=run.name, settings=dataclasses.asdict(run)) for run in _RUNS[scale])

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains and tests one model."""
        return run_capo(CapoRun(**cell.settings), folder / "run", console)

    def report(self, records: Sequence[Record]) -> Report:
        """Reports bits per parameter, with and without loops."""
        return capo_report(records)


CAPO = CapoExperiment()
