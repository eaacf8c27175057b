"""Measures the loss of a looped model that starts from a dense one, and the training steps until it has recovered.

    python -m experiments.dense_start --out runs/dense_start

Trains a dense model on the source of the local Python's standard library, writes it as a Llama folder, converts that
with norm placement `pre` and `sandwich` at T = 4, and trains each start with Stage I. For comparison it trains a looped
model from scratch, and continues the dense model. Two more starts change the second norms of the sandwich to reduce its
loss: small ones, which make a loop nearly the identity, and ones that match the dense model's branches (`dense_norms`).

Every loss is on the same held-out text. Finished runs are skipped, so the same command resumes where it stopped.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import looplm_jax
from experiments.dense_models import matched_scales, with_second_norms, write_llama
from experiments.dense_start_report import Course, Results, write_report
from looplm_jax.codec import override
from looplm_jax.config import CheckpointConfig, EvaluationConfig, NormPlacement, Recipe, SourceConfig, StartConfig
from looplm_jax.convert import convert_from_dense
from looplm_jax.data import collect_stdlib, validation_batches
from looplm_jax.errors import UserError
from looplm_jax.evaluation import evaluate_held_out
from looplm_jax.recipes import named_recipe
from looplm_jax.training._metrics import EVALUATION, read_metrics

_LOOPS = 4
_SMALL_NORM = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: its start, and its differences from the others."""

    name: str
    start: str = ""  # a folder below the experiment's; empty: initial parameters
    placement: NormPlacement = NormPlacement.SANDWICH
    loops: int = _LOOPS
    learning_rate: float = 5e-4


DENSE = Run(name="dense", placement=NormPlacement.PRE, loops=1, learning_rate=1.5e-3)
TRAINED_ON = Run(name="dense, trained on", start="runs/dense", placement=NormPlacement.PRE, loops=1)
PRE = Run(name="pre", start="starts/pre", placement=NormPlacement.PRE)
SANDWICH = Run(name="sandwich", start="starts/sandwich")
MATCHED = Run(name="sandwich, matched norms", start="starts/matched")
SMALL = Run(name="sandwich, small norms", start="starts/small")
SCRATCH = Run(name="looped from scratch", learning_rate=1.5e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the experiment: steps of the dense model, of later runs, between evaluations, and recipe changes."""

    runs: Sequence[Run]
    dense_steps: int
    steps: int
    every: int
    sequences: int
    changes: dict[str, object]


SCALES = {
    "full": Scale(
        runs=(TRAINED_ON, PRE, SANDWICH, MATCHED, SMALL, SCRATCH),
        dense_steps=1500,
        steps=800,
        every=25,
        sequences=64,
        changes={"model.num_layers": 2},
    ),
    "smoke": Scale(
        runs=(PRE, MATCHED, SCRATCH),
        dense_steps=6,
        steps=4,
        every=2,
        sequences=4,
        changes={
            "model.vocab_size": 384,
            "model.width": 32,
            "model.mlp_width": 48,
            "stage.batch_size": 2,
            "stage.sequence_length": 64,
            "mesh.data": 1,
            "data.validation_fraction": 0.3,
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not finished, writes the report, and prints what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dense_start"), help="default: runs/dense_start")
    parser.add_argument("--scale", choices=SCALES, default="full", help="default: full")
    arguments = parser.parse_args(argv)

    try:
        results = _Experiment(out=arguments.out, scale=SCALES[arguments.scale]).results()
    except UserError as error:
        print(f"dense_start: {error}", file=sys.stderr)
        return 2

    print(f"\nwrote {', '.join(write_report(arguments.out, results))} to {arguments.out}")
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Experiment:
    """The runs of one scale in one folder."""

    out: Path
    scale: Scale

    def results(self) -> Results:
        """Returns the results of every run in order; finished runs are only read."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self._corpus.exists():
            collect_stdlib(self._corpus)

        dense = self._train(DENSE)
        self._make_starts()
        return Results(
            dense_loss=dense.losses[-1][0], loops=_LOOPS, courses=[self._train(run) for run in self.scale.runs]
        )

    @property
    def _corpus(self) -> Path:
        """Returns the file of the documents."""
        return self.out / "corpus.jsonl"

    @property
    def _llama(self) -> Path:
        """Returns the folder of the dense model as a Llama."""
        return self.out / "llama"

    def _folder(self, run: Run) -> Path:
        """Returns the folder of a run."""
        return self.out / "runs" / run.name.replace(", ", "-").replace(" ", "-")

    def _train(self, run: Run) -> Course:
        """Trains a run unless it is finished. Returns its losses."""
        from looplm_jax.cli.train import run_training

        recipe, folder = self._recipe(run), self._folder(run)
        if _last_evaluation(folder) < recipe.total_steps:
            print(f"\n== {run.name}", flush=True)
            run_training(recipe, folder)

        rows = [row for row in read_metrics(folder) if row["kind"] == EVALUATION]
        course = {row["step"]: row["loss_per_loop"] for row in rows}
        # A start has no evaluation at step 0 in its metrics, so it is measured here.
        if run.start:
            course = {0: self._losses_at(recipe, self.out / run.start), **course}
        return Course(name=run.name, steps=list(course), losses=list(course.values()))

    def _recipe(self, run: Run) -> Recipe:
        """Returns the recipe of a run."""
        steps = self.scale.dense_steps if run is DENSE else self.scale.steps
        recipe = named_recipe("demo-one-loop" if run.loops == 1 else "demo")
        stage = dataclasses.replace(
            recipe.stages[0],
            steps=steps,
            learning_rate=run.learning_rate,
            warmup_steps=steps // 40,
            decay_steps=steps // 4,
            final_learning_rate=run.learning_rate / 10,
        )
        sources = (SourceConfig(path=str(self._corpus)),)
        # A start has its own tokenizer, and the dense run trains one; only a run from scratch needs a path.
        tokenizer = "" if run.start or run is DENSE else str(self._llama / "tokenizer.json")
        recipe = dataclasses.replace(
            recipe,
            name=run.name,
            description="",
            model=dataclasses.replace(recipe.model, norm_placement=run.placement),
            stages=(stage,),
            # One seed for the dense model, another for all later runs, which read the data in a new order.
            data=dataclasses.replace(recipe.data, sources=sources, tokenizer=tokenizer, seed=int(run is not DENSE)),
            start=StartConfig(checkpoint=str(self.out / run.start) if run.start else ""),
            checkpoint=CheckpointConfig(every=200, keep=1),
            evaluation=EvaluationConfig(every=self.scale.every, sequences=self.scale.sequences),
        )
        return override(recipe, self.scale.changes)

    def _losses_at(self, recipe: Recipe, checkpoint: Path) -> list[float]:
        """Returns the loss of every loop on the sequences that training is evaluated on."""
        loaded, stage = looplm_jax.load(checkpoint), recipe.stages[0]
        held_out = validation_batches(
            recipe.data,
            loaded.need_tokenizer(),
            batch_size=stage.batch_size,
            sequence_length=stage.sequence_length,
            max_sequences=recipe.evaluation.sequences,
        )
        return evaluate_held_out(loaded.model, loaded.params, held_out)["loss_per_loop"]

    def _make_starts(self) -> None:
        """Writes the dense model as a Llama folder, and every checkpoint that a run starts from."""
        if not self._llama.exists():
            write_llama(self._folder(DENSE), self._llama)

        starts = self.out / "starts"
        for placement in NormPlacement:
            if not (starts / placement.value).exists():
                convert_from_dense(self._llama, starts / placement.value, loops=_LOOPS, norm_placement=placement)

        if not (starts / "small").exists():
            convert_from_dense(
                self._llama,
                starts / "small",
                loops=_LOOPS,
                norm_placement=NormPlacement.SANDWICH,
                second_norm=_SMALL_NORM,
            )

        # Last, because it uses the checkpoints of both placements.
        if not (starts / "matched").exists():
            scales = matched_scales(starts / "pre", self._recipe(PRE))
            with_second_norms(starts / "sandwich", starts / "matched", scales)


def _last_evaluation(folder: Path) -> int:
    """Returns the last evaluated step, or 0."""
    return max((row["step"] for row in read_metrics(folder) if row["kind"] == EVALUATION), default=0)


if __name__ == "__main__":
    sys.exit(main())
