"""Configurations survive a round trip through JSON, accept overrides by path, and name errors in their input."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.codec import ABSENT, Difference, differences, from_dict, leaves, override, parse_flags, to_dict
from looplm_jax.config import (
    DataConfig,
    Injection,
    MeshConfig,
    ModelConfig,
    Objective,
    PriorConfig,
    PriorKind,
    Recipe,
    SourceConfig,
    Stage,
)
from looplm_jax.errors import UserError

MODEL = ModelConfig(vocab_size=11, width=12, mlp_width=8, num_layers=1, num_heads=2)
RECIPE = Recipe(
    name="r",
    model=MODEL,
    stages=(
        Stage(name="pretrain", steps=10, batch_size=4, sequence_length=8),
        Stage(name="gate", steps=5, batch_size=4, sequence_length=8, objective=Objective.GATE, trainable=("gate",)),
    ),
    data=DataConfig(sources=(SourceConfig(path="a.txt"), SourceConfig(path="b.txt", weight=2.0))),
)

words = st.text("abc_-", min_size=1, max_size=5)
positive = st.floats(1e-6, 1e6)
models = st.builds(
    lambda heads, dim, **rest: ModelConfig(num_heads=heads, width=heads * dim * 2, **rest),
    st.integers(1, 4),
    st.integers(1, 4),
    vocab_size=st.integers(1, 100),
    mlp_width=st.integers(1, 100),
    num_layers=st.integers(1, 100),
    injection=st.sampled_from(Injection),
    tied_head=st.booleans(),
    rope_theta=positive,
)
stages = st.builds(
    Stage,
    name=words,
    steps=st.integers(1, 10**8),
    batch_size=st.integers(1, 100),
    sequence_length=st.integers(65, 200),  # answers of a policy gradient have up to 64 tokens
    beta=st.floats(0, 1),
    objective=st.sampled_from(Objective),
    learning_rate=positive,
    prior=st.builds(PriorConfig, kind=st.sampled_from(PriorKind), rate=st.floats(0.01, 0.99)),
    trainable=st.lists(words, max_size=3).map(tuple),
)
recipes = st.builds(
    Recipe,
    name=st.text(max_size=8),
    description=st.text(max_size=8),
    model=models,
    stages=st.lists(stages, min_size=1, max_size=3, unique_by=lambda stage: stage.name).map(tuple),
    data=st.builds(DataConfig, sources=st.lists(st.builds(SourceConfig, path=words), max_size=2).map(tuple)),
)


def refuse(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@given(recipes)
def test_json_and_back_is_the_same_recipe(recipe):
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe


@given(recipes)
def test_overriding_a_field_by_its_own_value_changes_nothing(recipe):
    plain = {leaf.path: leaf.value for leaf in leaves(recipe) if isinstance(leaf.value, int | float)}
    assert override(recipe, plain) == recipe
    assert override(recipe, {path: str(value) for path, value in plain.items()}) == recipe
    assert differences(recipe, recipe) == []


def without(tree, *path):
    *parents, last = path
    holder = tree
    for key in parents:
        holder = holder[key]
    del holder[last]
    return tree


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**to_dict(MODEL), "widht": 3}, "unknown field 'widht'; did you mean 'width'?"),
        ({**to_dict(MODEL), "num_heads": "two"}, "num_heads: expected a whole number, got 'two'"),
        ({**to_dict(MODEL), "num_heads": 2.0}, "num_heads: expected a whole number, got 2.0"),
        ({**to_dict(MODEL), "num_heads": True}, "num_heads: expected a whole number, got True"),
        ({**to_dict(MODEL), "num_heads": None}, "num_heads: expected a whole number, got None"),
        ({**to_dict(MODEL), "init_std": "small"}, "init_std: expected a number, got 'small'"),
        ({**to_dict(MODEL), "init_std": "nan"}, "init_std: expected a finite number, got 'nan'"),
        ({**to_dict(MODEL), "init_std": float("inf")}, "init_std: expected a finite number, got inf"),
        ({**to_dict(MODEL), "init_std": 10**400}, f"init_std: expected a number, got {10**400}"),
        ({**to_dict(MODEL), "init_std": [1]}, "init_std: expected a number, got [1]"),
        ({**to_dict(MODEL), "tied_head": "maybe"}, "tied_head: expected true or false, got 'maybe'"),
        ({**to_dict(MODEL), "tied_head": 1}, "tied_head: expected true or false, got 1"),
        ({**to_dict(MODEL), "injection": "ad"}, "injection: no such choice 'ad'; did you mean 'add'?"),
        ({**to_dict(MODEL), "injection": ["add"]}, "injection: no such choice ['add']; did you mean 'add'?"),
        (without(to_dict(MODEL), "width"), "missing field 'width'"),
        ([1, 2], "ModelConfig: expected an object with named fields, got [1, 2]"),
    ],
)
def test_what_is_not_a_model_is_named(values, message):
    assert refuse(from_dict, ModelConfig, values) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model: expected an object with named fields, got 3"),
        ({"stages": {"a": 1}}, "stages: expected a list, got {'a': 1}"),
        ({"name": 3}, "name: expected text, got 3"),
        ({"mesh": {"fdsp": 2}}, "unknown field 'mesh.fdsp'; did you mean 'fsdp'?"),
        ({"model": without(to_dict(MODEL), "width")}, "missing field 'model.width'"),
    ],
)
def test_what_is_not_a_recipe_is_named_by_its_path(changes, message):
    assert refuse(from_dict, Recipe, {**to_dict(RECIPE), **changes}) == message


def test_a_field_of_a_stage_that_is_wrong_is_named_by_its_place():
    tree = to_dict(RECIPE)
    tree["stages"][1]["steps"] = "many"
    assert refuse(from_dict, Recipe, tree) == "stages.1.steps: expected a whole number, got 'many'"


def test_what_a_file_leaves_out_takes_its_default():
    assert from_dict(Recipe, without(to_dict(RECIPE), "mesh")).mesh == MeshConfig()


@pytest.mark.parametrize(
    ("path", "value", "read"),
    [
        ("model.loops", "6", lambda r: r.model.loops == 6),
        ("model.tied_head", "True", lambda r: r.model.tied_head is True),
        ("model.tied_head", "false", lambda r: r.model.tied_head is False),
        ("model.injection", "linear", lambda r: r.model.injection is Injection.LINEAR),
        ("model.init_std", "1e-3", lambda r: r.model.init_std == 1e-3),
        ("stages.gate.beta", 0.25, lambda r: [s.beta for s in r.stages] == [0.05, 0.25]),
        ("stage.beta", "0.25", lambda r: [s.beta for s in r.stages] == [0.25, 0.25]),
        ("stage.prior.kind", "geometric", lambda r: {s.prior.kind for s in r.stages} == {PriorKind.GEOMETRIC}),
        ("stages.pretrain.trainable", "gate,norm", lambda r: r.stages[0].trainable == ("gate", "norm")),
        ("stages.pretrain.trainable", "", lambda r: r.stages[0].trainable == ()),
        ("data.sources.1.weight", "3", lambda r: [s.weight for s in r.data.sources] == [1.0, 3.0]),
    ],
)
def test_one_field_is_replaced_by_its_path(path, value, read):
    changed = override(RECIPE, {path: value})
    assert read(changed)
    wanted = path.replace("stage.", "stages.pretrain.", 1) if path.startswith("stage.") else path
    changed_paths = {difference.path for difference in differences(RECIPE, changed)}
    assert changed_paths <= {wanted, wanted.replace("pretrain", "gate")}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.lops", "6", "unknown field 'model.lops'; did you mean 'model.loops'?"),
        ("stage.betta", "6", "unknown field 'stage.betta'; did you mean 'stage.beta'?"),
        ("stages.gat.beta", "6", "unknown field 'stages.gat.beta'; did you mean 'stages.gate.beta'?"),
        ("zzzzzz", "6", "unknown field 'zzzzzz'; `--help` lists them"),
        ("stage", "6", None),
        ("model", "6", None),
        ("model.norm_eps", "0", "model.norm_eps must be positive, not 0.0"),
        ("stages.gate.steps", "0", "stages.gate.steps must be at least 1, not 0"),
        ("model.loops", "many", "model.loops: expected a whole number, got 'many'"),
    ],
)
def test_an_override_that_cannot_be_is_refused_in_one_line(path, value, message):
    said = refuse(override, RECIPE, {path: value})
    assert said.startswith(message or f"unknown field {path!r}")


def test_overrides_are_validated_together():
    changed = override(RECIPE, {"model.num_heads": 6, "model.num_kv_heads": 3, "model.head_dim": 2})
    assert (changed.model.num_heads, changed.model.num_kv_heads) == (6, 3)
    assert RECIPE.model.num_heads == 2


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["--model.loops", "6", "--seed=3"], {"model.loops": "6", "seed": "3"}),
        (["--name=a=b", "--seed", "-1"], {"name": "a=b", "seed": "-1"}),
        (["--stage.trainable="], {"stage.trainable": ""}),
        (["--seed", "1", "--seed", "2"], {"seed": "2"}),
    ],
)
def test_flags_are_paths_and_values(words, changes):
    assert parse_flags(words) == changes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed", "3"], "unexpected argument 'seed'; fields are set with --name value"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--name", "x"], "--seed needs a value"),
    ],
)
def test_what_is_not_a_flag_is_refused_in_one_line(words, message):
    assert refuse(parse_flags, words) == message


def test_differences_name_both_values():
    other = dataclasses.replace(RECIPE, seed=4, model=dataclasses.replace(MODEL, injection=Injection.ADD))
    assert [str(field) for field in differences(RECIPE, other)] == ["seed: 0, 4", "model.injection: 'none', 'add'"]


def test_differences_see_stages_that_only_one_has():
    shorter = dataclasses.replace(RECIPE, stages=RECIPE.stages[:1])
    lines = [str(field) for field in differences(RECIPE, shorter)]
    assert "stages.gate.steps: 5, absent" in lines
    assert all(line.startswith("stages.gate.") for line in lines)


def test_differences_of_plain_values_are_those_of_the_configurations():
    other = dataclasses.replace(RECIPE, seed=4, stages=RECIPE.stages[:1])
    assert differences(to_dict(RECIPE), to_dict(other)) == differences(RECIPE, other)
    assert differences({"a": [{"x": 1}, 2], "b": None}, {"a": [{"x": 3}, 2]}) == [Difference("a.0.x", 1, 3)]
    assert differences({"a": {"b": 1}}, {}) == [Difference("a.b", 1, ABSENT)]


def test_leaves_carry_paths_values_and_help():
    by_path = {leaf.path: leaf for leaf in leaves(RECIPE)}
    assert by_path["stages.gate.prior.rate"].value == 0.5
    assert by_path["model.width"].annotation is int
    assert by_path["model.width"].help == "model width, D"
    assert by_path["data.sources.1.path"].value == "b.txt"
    assert list(by_path)[:3] == ["name", "description", "seed"]
