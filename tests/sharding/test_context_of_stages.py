"""Stages with different meshes: the same run, for any number of devices per sequence."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from looplm_jax.config import (
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    Recipe,
    Remat,
    SourceConfig,
    Stage,
)
from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import evaluate_held_out
from looplm_jax.training._metrics import read_metrics
from looplm_jax.training.run import train

SHORT = Stage(name="short", steps=2, batch_size=8, sequence_length=16, loops=2, learning_rate=1e-2)
LONG = dataclasses.replace(SHORT, name="long", sequence_length=32)
RECIPE = Recipe(
    name="two",
    model=ModelConfig(vocab_size=14, width=16, mlp_width=24, num_layers=1, num_heads=4, max_positions=64, loops=2),
    stages=(SHORT, LONG),
    compute=ComputeConfig(remat=Remat.NONE, loss_chunk=8),
    data=DataConfig(sources=(SourceConfig(path="mano:length=2,modulus=7"),)),
    evaluation=EvaluationConfig(sequences=8),
    log_every=1,
)


def trained(folder, mesh, context):
    """Returns the metrics of a run whose second stage has `context` devices per sequence."""
    stages = (SHORT, dataclasses.replace(LONG, context=context))
    recipe = dataclasses.replace(RECIPE, mesh=mesh, stages=stages)
    train(recipe, folder, evaluate=evaluate_held_out, console=Console(file=io.StringIO()))
    return read_metrics(folder)


@pytest.mark.slow
def test_a_stage_may_spread_its_sequences_over_devices(tmp_path):
    """Trains, evaluates and saves; the second stage begins with the resharded state of the first."""
    rows = trained(tmp_path / "shared", MeshConfig(data=2, fsdp=4), context=4)
    wanted = trained(tmp_path / "alone", MeshConfig(data=1), context=0)
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in wanted]
    assert [row["kind"] for row in rows].count("evaluation") == 2
    for row, other in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(row["loss_per_loop"], other["loss_per_loop"], rtol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "wanted"),
    [
        (MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=1, context=4)),
        (MeshConfig(data=8, fsdp=2), MeshConfig(data=2, fsdp=2, context=4)),
        (MeshConfig(data=2, fsdp=4, context=2), MeshConfig(data=2, fsdp=2, context=4)),
        (MeshConfig(fsdp=8), MeshConfig(fsdp=8, context=4)),
    ],
)
def test_a_sequence_takes_its_devices_from_fsdp_or_else_from_data(mesh, wanted):
    recipe = dataclasses.replace(RECIPE, mesh=mesh, stages=(SHORT, dataclasses.replace(LONG, context=4)))
    assert recipe.mesh_of(recipe.stages[0]) == mesh
    assert recipe.mesh_of(recipe.stages[1]) == wanted


def test_devices_that_cannot_be_taken_are_refused():
    message = r"3 devices cannot share a sequence: neither mesh.fsdp=4 nor mesh.data=2 divides; change one"
    with pytest.raises(UserError, match=message):
        MeshConfig(data=2, fsdp=4).with_context(3)


def test_a_run_whose_sequences_do_not_divide_is_refused_before_it_begins(tmp_path):
    stages = (SHORT, dataclasses.replace(LONG, sequence_length=30, context=4))
    recipe = dataclasses.replace(RECIPE, mesh=MeshConfig(data=2, fsdp=4), stages=stages)
    with pytest.raises(UserError, match=r"stages.long.sequence_length=30 does not divide over 4 devices"):
        train(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
