"""The Ouro pipeline: the numbers of the paper, and all stages at a thousandth of the size."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from looplm_jax.config import Recipe, Stage
from looplm_jax.convert._upcycle import Order, upcycle
from looplm_jax.errors import UserError
from looplm_jax.loading import load
from looplm_jax.models._looplm import count_params
from looplm_jax.recipes import RECIPES, Scale, named_recipe, scaled
from looplm_jax.training import run

T = 10**12
# Stage: tokens, sequence length, batch in tokens, loops, beta, first and last learning rate, rotary base (section 4).
PRINTED = {
    "pretrain-1": (1.5 * T, 4096, 2**22, 8, 0.1, 3e-4, 1e4),
    "pretrain-2": (1.5 * T, 4096, 2**23, 8, 0.1, 3e-4, 1e4),
    "pretrain-3": (3 * T, 4096, 2**23, 4, 0.05, 3e-4, 1e4),
    "anneal": (1.4 * T, 16384, 2**23, 4, 0.05, 3e-5, 4e4),
    "long-context": (0.02 * T, 65536, 2**23, 4, 0.05, 3e-5, 1e6),
    "mid-train": (0.3 * T, 32768, 2**23, 4, 0.05, 1e-5, 1e6),
}


def described(recipe: Recipe, stage: Stage) -> tuple[float, ...]:
    batch = stage.batch_size * stage.sequence_length
    last_rate = stage.final_learning_rate or stage.learning_rate
    base = recipe.model_of(stage).rope_theta
    return stage.steps * batch, stage.sequence_length, batch, stage.loops, stage.beta, last_rate, base


def test_the_stages_are_those_of_the_paper():
    recipe = named_recipe("ouro-1.4b")
    for stage in recipe.stages[:-1]:
        assert described(recipe, stage) == pytest.approx(PRINTED[stage.name], rel=1e-3)
    assert [stage.name for stage in recipe.stages] == [*PRINTED, "gate"]
    assert recipe.stages[3].learning_rate == 3e-4
    assert count_params(recipe.model) == 1_434_652_673


def test_both_sizes_share_the_stages_after_the_fork():
    small, large = named_recipe("ouro-1.4b"), named_recipe("ouro-2.6b")
    assert large.stages == tuple(dataclasses.replace(stage, settings=()) for stage in small.stages[2:])
    assert large.model.num_layers == 2 * small.model.num_layers
    assert [large.model_of(stage).rope_theta for stage in large.stages] == [
        small.model_of(stage).rope_theta for stage in small.stages[2:]
    ]


def test_mixtures_are_shares_of_the_whole():
    stages = {stage.name: stage for stage in named_recipe("ouro-1.4b").stages}
    for name in ("pretrain-1", "anneal", "long-context"):
        assert sum(source.weight for source in stages[name].sources) == pytest.approx(100)
    mid_train = {source.path: source.weight for source in stages["mid-train"].sources}
    assert sum(mid_train.values()) == pytest.approx(300)
    assert mid_train["sft-mix"] == 90
    assert mid_train["nemotron-cc"] == pytest.approx(30 * 0.734)


def test_each_stage_finds_the_corpora_of_its_own_length():
    recipe = named_recipe("ouro-1.4b")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root="gs://mine/{length}"))
    roots = {stage.name: recipe.data_of(stage).root for stage in recipe.stages}
    assert roots["pretrain-1"] == "gs://mine/4096"
    assert roots["long-context"] == "gs://mine/65536"


@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_recipe_keeps_its_stages(name):
    full = named_recipe(name)
    tiny = scaled(full, Scale.TINY)
    assert [stage.name for stage in tiny.stages] == [stage.name for stage in full.stages]
    assert [stage.loops for stage in tiny.stages] == [stage.loops for stage in full.stages]
    assert count_params(tiny.model) < count_params(full.model) / 4
    assert scaled(full, Scale.FULL) is full


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Returns a folder with a text for every source of every stage, each with a unique word."""
    root = tmp_path_factory.mktemp("corpora")
    paths = {
        source.path
        for name in ("ouro-1.4b", "ouro-2.6b")
        for stage in named_recipe(name).stages
        for source in stage.sources
    }
    generator = np.random.default_rng(0)
    for path in sorted(paths):
        (root / path).mkdir()
        words = [path.replace("-", " "), *("".join(generator.choice(list("abcdefgh"), 4)) for _ in range(60))]
        texts = (" ".join(generator.choice(words, 40)) for _ in range(80))
        (root / path / "part.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def tiny(name: str, corpora, **start) -> Recipe:
    from looplm_jax import codec

    recipe = scaled(named_recipe(name), Scale.TINY)
    small = dataclasses.replace(recipe.model, vocab_size=512)
    data = dataclasses.replace(recipe.data, root=str(corpora))
    return codec.override(dataclasses.replace(recipe, model=small, data=data), start)


def train(recipe: Recipe, folder, **kwargs):
    return run.train(recipe, folder, console=Console(file=io.StringIO()), **kwargs)


@pytest.fixture(scope="module")
def pipeline(corpora, tmp_path_factory):
    """Runs all stages of `ouro-1.4b`, stopped once in the middle of a stage and once at the end of one."""
    folder = tmp_path_factory.mktemp("runs") / "ouro"
    recipe = tiny("ouro-1.4b", corpora)
    stopped, to_device = [], run.to_device
    stops = {2 * 4 + 2, 5 * 4}  # in `pretrain-3`, and after `long-context`

    def stop_there(*arguments):
        import signal

        if len(stopped) + 1 in stops and stopped.count(len(stopped) + 1) == 0:
            signal.raise_signal(signal.SIGTERM)
        stopped.append(len(stopped) + 1)
        return to_device(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "to_device", stop_there)
        ends = [train(recipe, folder).step for _ in range(3)]
    return folder, recipe, ends


@pytest.mark.slow
def test_the_pipeline_runs_from_its_first_stage_to_its_last(pipeline):
    folder, recipe, ends = pipeline
    assert ends == [10, 20, recipe.total_steps]
    last = load(folder)
    assert last.model.config.rope_theta == 1e6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.params))


@pytest.mark.slow
def test_the_larger_model_goes_on_from_the_upcycled_fork(pipeline, corpora, tmp_path):
    folder, recipe, _ = pipeline
    fork = tmp_path / "fork"
    layers = 2 * recipe.model.num_layers
    upcycle(folder / "checkpoints" / "8", fork, layers=layers, order=Order.INTERLEAVE)
    larger = tiny("ouro-2.6b", corpora, **{"start.checkpoint": str(fork), "model.num_layers": str(layers)})
    assert train(larger, tmp_path / "larger").step == larger.total_steps
    assert load(tmp_path / "larger").model.config.num_layers == layers


def test_a_source_that_is_missing_is_named_before_anything_is_written(corpora, tmp_path):
    recipe = tiny("ouro-1.4b", corpora, **{"data.root": str(tmp_path / "elsewhere")})
    with pytest.raises(UserError, match=r"elsewhere/nemotron-cc"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
