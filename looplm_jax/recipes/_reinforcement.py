"""Recipes of reinforcement learning on given text. They start from a trained model.

looplm train --recipe looprpt-demo --start.checkpoint runs/demo/looped --data texts/
looplm train --recipe looprpt --start.checkpoint Ouro-1.4B --data omni_math.jsonl
"""

import dataclasses

from looplm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    Objective,
    OptimizerConfig,
    Recipe,
    RecordKind,
    Schedule,
    SourceConfig,
    Stage,
    StartConfig,
)
from looplm_jax.models import presets
from looplm_jax.recipes._small import demo

# Of the authors' code, as are the settings of `looprpt`.
_OPTIMIZER = OptimizerConfig(b2=0.999, weight_decay=0.01)


def looprpt() -> Recipe:
    """LoopRPT (arXiv 2603.19714) with its published settings: three epochs of 4,228 problems. Start it from Ouro."""
    return Recipe(
        name="looprpt",
        description=looprpt.__doc__ or "",
        model=presets.ouro_1_4b(),
        stages=(_stage(steps=1585, batch_size=8, sequence_length=4096, learning_rate=5e-6, warmup_steps=48),),
        optimizer=_OPTIMIZER,
        mesh=MeshConfig(data=1, fsdp=-1),
        # Omni-MATH, of whose 4,428 problems 200 are held out. The solutions are learned.
        data=DataConfig(
            sources=(
                SourceConfig(
                    path="omni_math.jsonl",
                    kind=RecordKind.PROBLEM,
                    prompt_key="problem",
                    answer_key="solution",
                    template="Problem: {prompt}\nSolution: ",
                ),
            ),
            validation_fraction=0.045,
        ),
        start=StartConfig(model=True),
        evaluation=EvaluationConfig(every=200, sequences=200),
    )


def looprpt_demo() -> Recipe:
    """LoopRPT for the looped model of the demonstration, in minutes on two cores. Start it from `runs/demo/looped`."""
    base = demo()
    return dataclasses.replace(
        base,
        name="looprpt-demo",
        description=looprpt_demo.__doc__ or "",
        stages=(_stage(steps=300, batch_size=4, sequence_length=128, learning_rate=5e-5, warmup_steps=9),),
        optimizer=_OPTIMIZER,
        start=StartConfig(model=True),
        checkpoint=CheckpointConfig(every=100, keep=2),
        evaluation=EvaluationConfig(every=100, sequences=256),
    )


def _stage(*, steps: int, batch_size: int, sequence_length: int, learning_rate: float, warmup_steps: int) -> Stage:
    """Returns the stage of LoopRPT: a short warm-up, then a cosine to zero."""
    return Stage(
        name="looprpt",
        objective=Objective.LOOPRPT,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        schedule=Schedule.COSINE,
        warmup_steps=warmup_steps,
    )
