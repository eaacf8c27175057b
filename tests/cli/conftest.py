import dataclasses
import json

import pytest
from quick_looplm import SHUFFLED_PIECES

from looplm_jax.cli.main import main
from looplm_jax.codec import to_dict
from looplm_jax.config import (
    CheckpointConfig,
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

RECIPE = Recipe(
    name="command",
    model=ModelConfig(vocab_size=12, width=16, mlp_width=24, num_layers=1, num_heads=2, loops=1, max_positions=64),
    stages=(Stage(name="only", steps=4, batch_size=2, sequence_length=16, loops=1),),
    compute=ComputeConfig(remat=Remat.NONE),
    mesh=MeshConfig(data=1),
    data=DataConfig(sources=(SourceConfig(path="mano:length=2,modulus=5"),), validation_fraction=0.0),
    checkpoint=CheckpointConfig(every=2, keep=3),
    evaluation=EvaluationConfig(sequences=4),
    log_every=1,
)


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory):
    """Writes the smallest recipe that trains."""
    path = tmp_path_factory.mktemp("recipe") / "command.json"
    path.write_text(json.dumps(to_dict(RECIPE)))
    return path


@pytest.fixture(scope="session")
def trained(recipe_file, tmp_path_factory):
    """Returns the folder of a run of that recipe."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:  # session fixtures run before module fixtures
        patch.setattr("looplm_jax.data._packing._SHUFFLED_PIECES", SHUFFLED_PIECES)
        assert main(["train", "--recipe", str(recipe_file), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def recipe():
    return dataclasses.replace(RECIPE)
