"""Upcycling: which order of the copied layers keeps the loss closer to the base, and which trains better from there.

    python -m experiments.upcycling --out runs/upcycling

Ouro-2.6B starts from the 24 layers of Ouro-1.4B, twice (paper, section 4.1), in an order that is not published. Here a
small looped model is trained on the source of the local Python's standard library, upcycled to twice its layers in
either order, and trained further, with the optimizer state and with a fresh one. The base itself is trained further for
comparison. All of them see the same data, in an order that is new to them, at a third of the previous learning rate.

Finished parts are skipped, so the same command resumes where it stopped.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.upcycling_report import Course, Results, write_results
from looplm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    Recipe,
    Schedule,
    SourceConfig,
    Stage,
    StartConfig,
)
from looplm_jax.convert import Order, upcycle
from looplm_jax.data import ValidationBatches, collect_stdlib, validation_batches
from looplm_jax.errors import UserError
from looplm_jax.evaluation import exit_curve
from looplm_jax.files import quoted
from looplm_jax.loading import load
from looplm_jax.models import LoopLM, Params
from looplm_jax.training._metrics import EVALUATION, read_metrics
from looplm_jax.training.run import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the comparison: the base and its training, the steps after upcycling, and the measurements."""

    model: ModelConfig
    base_steps: int
    warmup_steps: int
    base_learning_rate: float
    steps: int
    learning_rate: float
    measured_every: int
    sequences: int
    sequence_length: int
    seeds: tuple[int, ...]


_LAPTOP = Scale(
    model=ModelConfig(
        vocab_size=2048, width=192, mlp_width=512, num_layers=2, num_heads=4, rope_theta=1e4, max_positions=1024
    ),
    base_steps=1000,
    warmup_steps=40,
    base_learning_rate=1.5e-3,
    steps=200,
    learning_rate=5e-4,
    measured_every=50,
    sequences=256,
    sequence_length=128,
    seeds=(0, 1),
)
_SMOKE = dataclasses.replace(
    _LAPTOP,
    model=dataclasses.replace(_LAPTOP.model, vocab_size=384, width=32, mlp_width=48),
    base_steps=4,
    warmup_steps=0,
    steps=4,
    measured_every=2,
    sequences=4,
    sequence_length=64,
    seeds=(0,),
)
_NEW_ORDER = 1000  # added to the seed of later training, which reads the data in another order than the base
SCALES = {"laptop": _LAPTOP, "smoke": _SMOKE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A model that is trained further: the base itself, or one that was upcycled from it."""

    order: Order | None
    optimizer: bool

    @property
    def name(self) -> str:
        """Returns the name in the results, which is also the name of its folder."""
        model = "base" if self.order is None else self.order.value
        return model if self.optimizer else f"{model}-fresh-optimizer"


VARIANTS = tuple(Variant(order=order, optimizer=on) for on in (True, False) for order in (None, *Order))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not finished, writes the results, and prints where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/upcycling"), help="folder (default: runs/upcycling)")
    parser.add_argument("--scale", choices=SCALES, default="laptop", help="smoke: seconds, to see that it works")
    arguments = parser.parse_args(argv)
    scale = SCALES[arguments.scale]

    try:
        courses = _courses(arguments.out, scale)
    except UserError as error:
        print(f"upcycling: {error}", file=sys.stderr)
        return 2

    command = f"python -m experiments.upcycling --scale {arguments.scale}"
    results = Results(command=command, scale=dataclasses.asdict(scale), courses=courses)
    print(f"\nwrote {', '.join(write_results(arguments.out, results))} to {arguments.out}")
    first = _base(arguments.out, scale.seeds[0])
    print(f"next: looplm convert upcycle {quoted(first)} deeper --layers {2 * scale.model.num_layers}")
    return 0


# The courses of training


def _courses(out: Path, scale: Scale) -> list[Course]:
    """Returns the courses of all variants, after training a base for every seed."""
    corpus = out / "corpus.jsonl"
    if not corpus.exists():
        out.mkdir(parents=True, exist_ok=True)
        collect_stdlib(corpus)

    courses = []
    for seed in scale.seeds:
        print(f"\n== seed {seed}: base", flush=True)
        base = _train_base(out, scale, seed)
        for variant in VARIANTS:
            print(f"\n== seed {seed}: {variant.name}", flush=True)
            courses.append(_train_on(out, scale, seed, variant, base))
    return courses


def _train_base(out: Path, scale: Scale, seed: int) -> Path:
    """Trains the base, and returns its run folder. All seeds share the tokenizer of the first."""
    folder, first = _base(out, seed), _base(out, scale.seeds[0])
    stage = _stage(scale, scale.base_steps, scale.base_learning_rate, warmup_steps=scale.warmup_steps)
    recipe = _recipe(out, scale, seed, stage)

    if folder != first:
        recipe = dataclasses.replace(
            recipe, data=dataclasses.replace(recipe.data, tokenizer=str(first / "tokenizer.model"))
        )
    _train(recipe, folder)
    return folder


def _train_on(out: Path, scale: Scale, seed: int, variant: Variant, base: Path) -> Course:
    """Upcycles the base for a variant, trains it, and returns its measured losses."""
    folder = out / f"seed-{seed}" / variant.name
    start, model = base, scale.model

    if variant.order is not None:
        model = dataclasses.replace(model, num_layers=2 * model.num_layers)
        start = folder / "start"
        # staged_folder makes it complete, or not at all.
        if not start.exists():
            print(upcycle(base, start, layers=model.num_layers, order=variant.order))

    stage = _stage(scale, scale.steps, scale.learning_rate)
    recipe = dataclasses.replace(
        _recipe(out, scale, seed + _NEW_ORDER, stage, measured_every=scale.measured_every),
        model=model,
        start=StartConfig(checkpoint=str(start), optimizer=variant.optimizer),
    )

    at_start = _measured_at_start(start, recipe, folder / "at_start.json")
    _train(recipe, folder / "run")
    rows = [{"step": 0, **at_start}, *(row for row in read_metrics(folder / "run") if row["kind"] == EVALUATION)]
    return Course(
        seed=seed,
        variant=variant.name,
        steps=[row["step"] for row in rows],
        loss_per_loop=[row["loss_per_loop"] for row in rows],
        expected_loss=[row["expected_loss"] for row in rows],
    )


# Recipes and runs


def _stage(scale: Scale, steps: int, learning_rate: float, *, warmup_steps: int = 0) -> Stage:
    """Returns the only stage, with a constant learning rate."""
    return Stage(
        name="pretrain",
        steps=steps,
        batch_size=4,
        sequence_length=scale.sequence_length,
        loops=scale.model.loops,
        beta=0.1,
        learning_rate=learning_rate,
        schedule=Schedule.CONSTANT,
        warmup_steps=warmup_steps,
    )


def _recipe(out: Path, scale: Scale, seed: int, stage: Stage, *, measured_every: int = 0) -> Recipe:
    """Returns the recipe of one run."""
    corpus = SourceConfig(path=str(out / "corpus.jsonl"))
    return Recipe(
        name="upcycling",
        seed=seed,
        model=scale.model,
        stages=(stage,),
        mesh=MeshConfig(data=1),
        data=DataConfig(sources=(corpus,), validation_fraction=0.05, seed=seed),
        checkpoint=CheckpointConfig(every=500, keep=1),
        evaluation=EvaluationConfig(every=measured_every, sequences=scale.sequences),
    )


def _train(recipe: Recipe, folder: Path) -> None:
    """Trains a recipe unless it is finished, which is when the last step has an evaluation."""
    if any((row["kind"], row["step"]) == (EVALUATION, recipe.total_steps) for row in read_metrics(folder)):
        return
    stopped_by = train(recipe, folder, evaluate=_measure).stopped_by
    if stopped_by is not None:
        print("upcycling: stopped; the same command resumes there", file=sys.stderr)
        # As shells report a process that a signal ended.
        sys.exit(128 + stopped_by)


def _measured_at_start(checkpoint: Path, recipe: Recipe, memory: Path) -> dict[str, Any]:
    """Measures a checkpoint as training does; the file `memory` caches the result."""
    if not memory.exists():
        loaded, stage = load(checkpoint), recipe.stages[0]
        held_out = validation_batches(
            recipe.data,
            loaded.need_tokenizer(),
            batch_size=stage.batch_size,
            sequence_length=stage.sequence_length,
            max_sequences=recipe.evaluation.sequences,
        )

        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(_measure(loaded.model, loaded.params, held_out)))
    return json.loads(memory.read_text())


def _measure(model: LoopLM, params: Params, held_out: ValidationBatches) -> dict[str, Any]:
    """Returns the loss after each loop, and the expected loss that training minimizes, in nats per token."""
    exits = exit_curve(model, params, held_out)
    return {"loss_per_loop": list(exits.fixed.loss), "expected_loss": exits.expected_loss}


def _base(out: Path, seed: int) -> Path:
    """Returns the run folder of a seed's base."""
    return out / f"seed-{seed}" / "base-run"


if __name__ == "__main__":
    sys.exit(main())
