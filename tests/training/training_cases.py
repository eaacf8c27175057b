"""A recipe that trains in seconds, and random batches for its steps."""

import dataclasses
from typing import Any

import jax
import numpy as np

from looplm_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    Objective,
    OptimizerConfig,
    Recipe,
    Remat,
    Schedule,
    SourceConfig,
    Stage,
)
from looplm_jax.data import Batch

TASK = "mano:length=2,modulus=5"
MODEL = ModelConfig(vocab_size=12, width=16, mlp_width=24, num_layers=1, num_heads=2, loops=2, max_positions=64)
STAGE = Stage(
    name="pretrain",
    steps=6,
    batch_size=4,
    sequence_length=16,
    min_loops=1,
    loops=2,
    learning_rate=1e-2,
    schedule=Schedule.COSINE,
    warmup_steps=2,
)
GATE = Stage(
    name="gate", objective=Objective.GATE, steps=4, batch_size=4, sequence_length=16, loops=2, learning_rate=1e-2
)
RECIPE = Recipe(
    name="tiny",
    model=MODEL,
    stages=(STAGE, GATE),
    compute=ComputeConfig(remat=Remat.NONE, loss_chunk=16),
    mesh=MeshConfig(data=1),
    optimizer=OptimizerConfig(clip_norm=0.5),
    data=DataConfig(sources=(SourceConfig(path=TASK),)),
    checkpoint=CheckpointConfig(every=2, keep=2),
    evaluation=EvaluationConfig(every=3, sequences=4),
    log_every=1,
)


def random_batch(seed: int, *, rows: int = 4, length: int = 16, vocab_size: int = 12) -> Batch:
    """Returns sequences of two documents each. The number of masked positions varies much between sequences."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
    cut = generator.integers(2, length - 2, (rows, 1))
    columns = np.arange(length)[None]
    kept = generator.random((rows, length)) < np.linspace(0.1, 1.0, rows)[:, None]
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=(1 + (columns >= cut)).astype(np.int32),
        positions=np.where(columns < cut, columns, columns - cut).astype(np.int32),
        loss_mask=kept.astype(np.float32),
    )


def one_stage(stage: Stage, **changes: Any) -> Recipe:
    """Returns the recipe with a single stage."""
    return dataclasses.replace(RECIPE, stages=(stage,), **changes)


def assert_identical(actual: Any, wanted: Any) -> None:
    """Asserts that two trees are equal in structure, dtype and every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
