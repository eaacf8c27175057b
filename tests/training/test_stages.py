"""Stages may differ in their data and in the base of the rotary embedding, as in the paper."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console
from training_cases import GATE, RECIPE

from looplm_jax.checkpoints import read_metadata
from looplm_jax.config import DataConfig, Recipe, SourceConfig, Stage
from looplm_jax.errors import UserError
from looplm_jax.loading import load
from looplm_jax.training import _compile as program
from looplm_jax.training import run
from looplm_jax.training._metrics import read_metrics


def stage(name: str, **changes) -> Stage:
    return dataclasses.replace(GATE, name=name, steps=2, **changes)


def test_a_base_of_a_stage_holds_from_there_on():
    stages = (stage("a"), stage("b", rope_theta=4e4), stage("c"), stage("d", rope_theta=1e6))
    recipe = dataclasses.replace(RECIPE, stages=stages)
    assert [recipe.model_of(each).rope_theta for each in stages] == [recipe.model.rope_theta, 4e4, 4e4, 1e6]


@pytest.mark.slow
def test_a_stage_is_trained_on_its_own_mixture_with_its_own_base(tmp_path, monkeypatch):
    """Checks the batches on the devices, and the model that each checkpoint is loaded as."""
    texts = [tmp_path / f"{word}.txt" for word in ("ab", "cd")]
    for text in texts:
        text.write_text((text.stem + "\n\n") * 400)
    placed = []
    monkeypatch.setattr(
        run, "to_device", lambda batch, *rest: placed.append(np.unique(batch.tokens)) or program.to_device(batch, *rest)
    )
    tokenizer = str(_tokenizer(tmp_path))
    recipe = Recipe(
        name="two",
        model=dataclasses.replace(RECIPE.model, vocab_size=_vocabulary(tokenizer)),
        stages=(
            stage("first", sources=(SourceConfig(path=str(texts[0])),)),
            stage("second", sources=(SourceConfig(path=str(texts[1])),), rope_theta=500.0),
        ),
        compute=RECIPE.compute,
        mesh=RECIPE.mesh,
        data=DataConfig(tokenizer=tokenizer, validation_fraction=0.0),
    )
    run.train(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    assert {row["stage"] for row in read_metrics(tmp_path / "run")} <= {"first", "second"}
    first, second = set(np.concatenate(placed[:2])), set(np.concatenate(placed[2:]))
    assert len(placed) == 4
    assert first - second  # each has letters that the other does not have
    assert second - first
    loaded = [load(tmp_path / "run", step=step) for step in (2, 4)]
    assert [each.model.config.rope_theta for each in loaded] == [recipe.model.rope_theta, 500.0]
    assert read_metadata(str(tmp_path / "run"), 4).recipe().model == loaded[1].recipe.model


def test_stages_with_different_vocabularies_are_refused(tmp_path):
    other = stage("other", sources=(SourceConfig(path="mano:length=2,modulus=7"),))
    recipe = dataclasses.replace(RECIPE, stages=(stage("one"), other))
    with pytest.raises(
        UserError, match=r"stages.other.sources and those of one have different vocabularies; a run has"
    ):
        run.train(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_a_negative_base_is_refused():
    with pytest.raises(UserError, match=r"stages.a.rope_theta must not be negative, not -1.0"):
        stage("a", rope_theta=-1.0)


def _tokenizer(folder):
    from looplm_jax.data import train_sentencepiece

    path = folder / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["abcd dcba"] * 50, 270).serialize())
    return path


def _vocabulary(tokenizer: str) -> int:
    from looplm_jax.data import load_tokenizer

    return load_tokenizer(tokenizer).vocab_size
