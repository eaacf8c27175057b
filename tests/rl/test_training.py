"""Stages that learn from answers: on policy, the same however they are computed, and resumed bit by bit."""

import dataclasses
import functools
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from looplm_jax.checkpoints import CheckpointStore
from looplm_jax.config import (
    Advantage,
    Aggregation,
    CheckpointConfig,
    ComputeConfig,
    Credit,
    DataConfig,
    EvaluationConfig,
    InitialState,
    Injection,
    MeshConfig,
    ModelConfig,
    Objective,
    OptimizerConfig,
    PolicyConfig,
    Recipe,
    Remat,
    SourceConfig,
    Stage,
)
from looplm_jax.distributed import SINGLE_PROCESS
from looplm_jax.distributed._process_group import SingleProcess
from looplm_jax.errors import UserError
from looplm_jax.inference import Rollouts
from looplm_jax.losses import group_advantages
from looplm_jax.models._looplm import LoopLM
from looplm_jax.rl import rollout_collector
from looplm_jax.rl._collect import StageCollector
from looplm_jax.sharding import make_mesh
from looplm_jax.training import read_metrics, run
from looplm_jax.training._compile import StagePrograms, rollouts_to_device
from looplm_jax.training._metrics import as_values
from looplm_jax.training._policy import RolloutBatch
from looplm_jax.training._rollout_log import RolloutLog
from looplm_jax.training._run_folder import check_run_folder
from looplm_jax.training._setup import prepare_run
from looplm_jax.training._state import abstract_state, initial_state

LOOPS, PROMPTS, ANSWERS, NEW = 2, 2, 4, 3
ACTION = PolicyConfig(answers=ANSWERS, max_new_tokens=NEW, slots=4, gap_tolerance=1e-4)
STAGE = Stage(
    name="policy",
    objective=Objective.POLICY_GRADIENT,
    steps=4,
    batch_size=PROMPTS,
    sequence_length=16,
    loops=LOOPS,
    learning_rate=1e-2,
    policy=ACTION,
)
RECIPE = Recipe(
    name="tiny",
    # A large initial scale, so that gates and predictions differ.
    model=ModelConfig(
        vocab_size=13, width=16, mlp_width=24, num_layers=1, num_heads=2, loops=LOOPS, max_positions=64, init_std=0.3
    ),
    stages=(STAGE,),
    compute=ComputeConfig(remat=Remat.NONE, loss_chunk=16),
    mesh=MeshConfig(data=1),
    optimizer=OptimizerConfig(weight_decay=0.0),
    data=DataConfig(sources=(SourceConfig(path="addition:longest=2,digits=1,terms=2"),)),
    checkpoint=CheckpointConfig(every=2, keep=9),
    evaluation=EvaluationConfig(sequences=4),
    log_every=1,
)


def even_digits(prompt, text, answer):
    """A reward that random answers get often: the share of even digits."""
    del prompt, answer
    return sum(digit in "02468" for digit in text.split()) / 3


def recipe_with(policy=ACTION, **changes):
    fields = {name: changes.pop(name) for name in list(changes) if hasattr(STAGE, name)}
    return dataclasses.replace(RECIPE, stages=(dataclasses.replace(STAGE, policy=policy, **fields),), **changes)


def train(folder, recipe=RECIPE, collect=None):
    said = io.StringIO()
    collect = collect or rollout_collector(even_digits)
    outcome = run.train(recipe, folder, collect=collect, console=Console(file=said, soft_wrap=True))
    return outcome, said.getvalue()


def final_state(folder, recipe=RECIPE):
    mesh, model = make_mesh(recipe.mesh), LoopLM(recipe.model, recipe.compute)
    store = CheckpointStore(folder / "checkpoints", keep=9)
    return store.restore(lambda _: abstract_state(recipe, model, recipe.stages[0], mesh), None).state


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    _, said = train(folder)
    return folder, said


def test_every_step_is_on_policy(finished):
    folder, said = finished
    rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 <= row["rollout_gap"] < 1e-4
        assert row["tokens"] == round(row["answer_tokens"] * PROMPTS * ANSWERS)
        assert 1 <= row["mean_exit_loop"] <= LOOPS
        assert row["clipped"] == 0
    assert any(row["rollout_gap"] > 0 for row in rows)
    assert "reward" in said
    assert "gap" in said


def test_rollouts_are_kept_with_their_exits(finished):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    for line in lines:
        assert len(line["tokens"]) == len(line["exit_loops"]) <= NEW
        assert line["reward"] == pytest.approx(even_digits("", line["text"], ""))
        assert line["prompt"].startswith("<end>")


def test_a_run_that_lost_its_last_steps_makes_the_same_rollouts_again(finished, tmp_path):
    """Bit by bit, as after a kill between rollout and update."""
    folder, _ = finished
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "4")
    _, said = train(again)
    assert "resuming from step 2" in said
    for one, other in zip(jax.tree.leaves(final_state(folder)), jax.tree.leaves(final_state(again)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (again / "rollouts.jsonl").read_bytes() == (folder / "rollouts.jsonl").read_bytes()


def test_a_line_of_rollouts_that_was_cut_is_dropped(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"broken\n{"step": 1')
    log = RolloutLog(tmp_path, step=1)
    log.write(2, [{"text": "a"}])
    log.close()
    assert (tmp_path / "rollouts.jsonl").read_text() == '{"step": 1}\n{"step": 2, "text": "a"}\n'


@pytest.mark.slow
def test_rewards_rise(tmp_path):
    """Of a reward that every token can earn, within 25 steps."""
    recipe = recipe_with(steps=25, batch_size=8, learning_rate=3e-2, checkpoint=CheckpointConfig(every=30))
    train(tmp_path / "run", recipe)
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3


@pytest.mark.parametrize(
    ("recipe", "collect", "message"),
    [
        (
            recipe_with(dataclasses.replace(ACTION, gap_tolerance=1e-12)),
            rollout_collector(even_digits),
            "step 1: log-probabilities of rollout and replay differ by",
        ),
        (RECIPE, rollout_collector(lambda *_: float("nan")), "problem 1: a reward must be a finite number, not nan"),
        (
            recipe_with(dataclasses.replace(ACTION, max_new_tokens=8), sequence_length=9),
            None,
            "problem 1: the prompt has 5 tokens, which with 8 new ones exceed a window of 9",
        ),
    ],
)
def test_what_ends_a_run(recipe, collect, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", recipe, collect)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_collector_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"^stage policy learns from rollouts; pass collect="):
        run.train(RECIPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_exits_of_no_meaning_are_refused_before_anything_is_written(tmp_path):
    recipe = recipe_with(dataclasses.replace(ACTION, credit=Credit.TOKEN, exits="nonsense"))
    with pytest.raises(UserError, match=r"^unknown exit policy 'nonsense'"):
        train(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_random_first_states_are_refused():
    model = dataclasses.replace(RECIPE.model, injection=Injection.ADD, initial_state=InitialState.NOISE)
    with pytest.raises(UserError, match=r"objective=policy_gradient replays its answers, and no replay reproduces"):
        dataclasses.replace(RECIPE, model=model)


# Collectors


class Group(SingleProcess):
    """One of several processes, without the others."""

    def __init__(self, index, count):
        self.index, self.count = index, count


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = check_run_folder(tmp_path_factory.mktemp("collect") / "run", RECIPE)
    return prepare_run(RECIPE, folder, Console(file=io.StringIO()))


def drawn(answers):
    """Returns what a process generated, without numbers that depend on which answers shared a batch."""
    return [[(answer["tokens"], answer["exit_loops"], answer["reward"]) for answer in own] for own in answers]


@pytest.mark.slow
def test_processes_answer_what_one_would(setup):
    """Here the first of three processes has no problem to answer."""
    params, step = setup.position.state.params, 1
    whole = StageCollector(setup, 0, SINGLE_PROCESS, even_digits).generate(params, step)
    shares = [StageCollector(setup, 0, Group(index, 3), even_digits).generate(params, step) for index in range(3)]
    assert [len(share) for share in shares] == [0, 1, 1]
    assert drawn(whole) == [answers for share in shares for answers in drawn(share)]
    # As the processes exchange them.
    assert json.loads(json.dumps(whole)) == [[{**own, **as_lists(own)} for own in answers] for answers in whole]


def as_lists(answer):
    return {name: list(value) for name, value in answer.items() if isinstance(value, tuple)}


def test_answers_are_padded_to_the_longest_of_their_step(setup):
    """Not to 64 positions: a replay costs a forward and a backward pass of each."""
    collector = StageCollector(setup, 0, SINGLE_PROCESS, even_digits)
    batch = collector.collect(collector.generate(setup.position.state.params, 0), 0).batch
    rollouts = batch.rollouts
    assert batch.columns == (rollouts.prompt_lengths.max(), rollouts.lengths.max()) == (5, NEW)
    np.testing.assert_array_equal(batch.log_probs < 0, rollouts.mask)


# Steps


@functools.cache
def rollouts():
    """Returns random rollouts, of which those of a row have any length and exits."""
    generator = np.random.default_rng(0)
    rows = PROMPTS * ANSWERS
    shape = (rows, NEW)
    return RolloutBatch(
        rollouts=Rollouts(
            prompts=generator.integers(13, size=(rows, 5)).astype(np.int32),
            prompt_lengths=generator.integers(1, 6, rows).astype(np.int32),
            tokens=generator.integers(13, size=shape).astype(np.int32),
            exit_loops=generator.integers(1, LOOPS + 1, shape).astype(np.int32),
            lengths=generator.integers(1, NEW + 1, rows).astype(np.int32),
        ),
        advantages=generator.normal(size=rows).astype(np.float32),
        log_probs=np.zeros(shape, np.float32),
        exit_log_probs=np.zeros(shape, np.float32),
        numbers=np.arange(rows, dtype=np.int32),
    )


def step(recipe, batch=None):
    """Returns the state before and after one step of a recipe, and its metrics."""
    batch, stage, mesh = batch or rollouts(), recipe.stages[0], make_mesh(recipe.mesh)
    model = LoopLM(recipe.model, recipe.compute)
    programs = StagePrograms(recipe, model, stage, mesh, first_step=0)
    programs.compile(LOOPS, batch.columns)
    state = initial_state(recipe, model, stage, mesh)
    before = jax.device_get(state)
    after, metrics = programs.run(LOOPS, state, rollouts_to_device(batch, stage, mesh), batch.columns)
    return before, jax.device_get(after), as_values(metrics)


@functools.cache
def plain_step():
    return step(RECIPE)


def change(before, after):
    return jax.tree.map(lambda a, b: b - a, before.params, after.params)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"accumulation": 2}, marks=pytest.mark.slow),
        pytest.param({"mesh": MeshConfig(data=2)}, marks=pytest.mark.slow),
        {"mesh": MeshConfig(data=2, fsdp=2), "accumulation": 2},
    ],
    ids=["microbatches", "data", "all"],
)
def test_a_step_is_the_same_however_it_is_computed(changes):
    before, after, metrics = plain_step()
    _, other, others = step(recipe_with(**changes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), after.params, other.params)
    for name in ("loss", "gradient_norm", "rollout_gap", "policy_loss"):
        assert metrics[name] == pytest.approx(others[name], rel=1e-4, abs=1e-6)
    assert np.abs(change(before, after)["gate"]["kernel"]).max() > 1e-3


def test_a_token_moves_no_gate():
    """The gradient of the gate is exactly 0 with the credit of tokens alone, and not 0 with that of actions."""
    policy = dataclasses.replace(ACTION, credit=Credit.TOKEN, exits="q=0.5")
    before, after, _ = step(recipe_with(policy))
    moved = change(before, after)
    assert not np.any(moved["gate"]["kernel"])
    assert np.any(moved["head"])


def test_all_loops_of_a_token_learn():
    policy = dataclasses.replace(
        ACTION, credit=Credit.TRAJECTORY, exits="loops=2", aggregation=Aggregation.TOKEN, kl_weight=0.1
    )
    batch = dataclasses.replace(
        rollouts(), rollouts=rollouts().rollouts.replace(exit_loops=np.full((8, NEW), LOOPS, np.int32))
    )
    before, after, metrics = step(recipe_with(policy), batch)
    assert np.any(change(before, after)["gate"]["kernel"])
    # The parameters at the start are those of the first step, and stay.
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.teacher, before.params)


@pytest.mark.slow
def test_several_updates_of_a_step():
    """The first is that of a single one. The next ones move the parameters on, and the ratio from 1."""
    before, after, metrics = plain_step()
    many = dataclasses.replace(ACTION, updates=3)
    _, other, others = step(recipe_with(many))
    assert metrics["loss"] == pytest.approx(others["loss"], rel=1e-5)
    assert int(other.step) == int(after.step) == 1
    once, thrice = (np.abs(change(before, own)["gate"]["kernel"]).max() for own in (after, other))
    assert thrice > 1.5 * once


# Settings


@pytest.mark.parametrize(
    ("policy", "fields", "message"),
    [
        ({"exits": "q=0.5"}, {}, "credit=action rewards exits that are drawn, so policy.exits must be sampled"),
        ({"exits": "sampled,max=2"}, {}, "credit=action rewards exits that are drawn"),
        ({"credit": Credit.TRAJECTORY}, {}, "rewards all loops, so policy.exits must be loops=2, not 'sampled'"),
        ({"answers": 1}, {}, "policy.answers must be at least 2"),
        ({}, {"loops": 1}, "there is one exit with one loop"),
        ({}, {"min_loops": 1}, r"min_loops and stages\.policy\.depth have no meaning for objective=policy_gradient"),
        (
            {"credit": Credit.TOKEN, "exits": "q=0.5"},
            {"trainable": ("gate",)},
            "learns nothing from policy.credit=token",
        ),
        ({"max_new_tokens": 16}, {}, "leaves no room for a prompt"),
        ({"clip_low": -0.1}, {}, "policy.clip_low must not be negative"),
        ({"gap_tolerance": 0.0}, {}, "policy.gap_tolerance must be positive"),
    ],
)
def test_settings_that_do_not_fit(policy, fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(STAGE, policy=dataclasses.replace(ACTION, **policy), **fields)


def test_two_batches_of_one_prompt_are_one_batch_of_two():
    """Answers are compared within their prompt: advantages do not depend on the other prompts."""
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.0]])
    for advantage in Advantage:
        together = group_advantages(rewards, advantage)
        alone = jnp.concatenate([group_advantages(rewards[row : row + 1], advantage) for row in range(2)])
        np.testing.assert_array_equal(together, alone)
