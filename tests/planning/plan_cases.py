"""A recipe that the TPU compiler compiles in seconds."""

import dataclasses

from looplm_jax.config import ComputeConfig, MeshConfig, ModelConfig, Objective, Recipe, Stage

MODEL = ModelConfig(vocab_size=1024, width=256, mlp_width=512, num_layers=2, num_heads=2, loops=3)
STAGE = Stage(name="first", steps=10, batch_size=16, sequence_length=256, loops=3, accumulation=2)
GATE = Stage(name="gate", objective=Objective.GATE, steps=10, batch_size=8, sequence_length=256, loops=3)


def recipe_with(*stages: Stage, mesh: MeshConfig | None = None, **compute: object) -> Recipe:
    """Returns the recipe with these stages, on a mesh that shards the parameters over all devices."""
    return Recipe(
        name="planned",
        model=MODEL,
        stages=stages or (STAGE, GATE),
        compute=ComputeConfig(**compute),  # type: ignore[arg-type]
        mesh=mesh or MeshConfig(data=1, fsdp=-1),
    )


def with_stage(**changes: object) -> Stage:
    """Returns the first stage with some fields replaced."""
    return dataclasses.replace(STAGE, **changes)  # type: ignore[arg-type]
