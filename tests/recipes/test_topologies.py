"""Settings for topologies: what they replace, what flags keep, and what is said about them."""

import dataclasses
import json

import pytest

from looplm_jax import codec
from looplm_jax.config import (
    ComputeConfig,
    Gather,
    MeshConfig,
    ModelConfig,
    Recipe,
    Reduce,
    Remat,
    Stage,
    TopologySettings,
)
from looplm_jax.errors import UserError
from looplm_jax.recipes import RECIPES, Scale, named_recipe, scaled
from looplm_jax.recipes._topologies import known_topologies, on_topology, settings_in_use, with_settings

V5E = TopologySettings(
    topology="v5e:4x4",
    accumulation=4,
    mesh=MeshConfig(data=1, fsdp=8, context=2),
    compute=ComputeConfig(remat=Remat.SAVE_QKV, gather=Gather.PER_STEP, reduce=Reduce.STEP),
)
V5P = dataclasses.replace(V5E, topology="2 x v5p:2x2x4", accumulation=1, mesh=MeshConfig(data=2, fsdp=16))
FIRST = Stage(name="first", steps=1, batch_size=64, sequence_length=16, accumulation=2, settings=(V5E, V5P))
LAST = Stage(name="last", steps=1, batch_size=64, sequence_length=16)
RECIPE = Recipe(
    name="r",
    model=ModelConfig(vocab_size=8, width=8, mlp_width=8, num_layers=1, num_heads=2),
    stages=(FIRST, LAST),
    compute=ComputeConfig(remat=Remat.LOOP),
    mesh=MeshConfig(data=4, fsdp=4),
)


def used(topology, /, **flags):
    """How the first stage is computed on a topology, with flags."""
    given = {path.replace("__", "."): value for path, value in flags.items()}
    recipe = on_topology(codec.override(RECIPE, given), topology, given)
    stage = recipe.stages[0]
    return stage.accumulation, recipe.mesh_of(stage), recipe.compute_of(stage)


def test_a_stage_is_computed_by_its_settings_for_the_topology():
    for settings in (V5E, V5P):
        assert used(settings.topology) == (settings.accumulation, settings.mesh, settings.compute)


def test_elsewhere_and_in_other_stages_the_recipe_decides():
    assert used("v5e:2x2") == (FIRST.accumulation, RECIPE.mesh, RECIPE.compute)
    recipe = on_topology(RECIPE, "v5e:4x4")
    assert recipe.stages[1] == LAST
    assert recipe.compute_of(LAST) == RECIPE.compute
    assert recipe.mesh_of(LAST) == RECIPE.mesh
    alone = dataclasses.replace(RECIPE, stages=(LAST,))
    assert on_topology(alone, "v5e:4x4") is alone


def test_flags_take_precedence_field_by_field():
    assert used("v5e:4x4", compute__remat="dots")[2] == dataclasses.replace(V5E.compute, remat=Remat.DOTS)
    for path in ("stage__accumulation", "stages__first__accumulation"):
        assert used("v5e:4x4", **{path: "8"}) == (8, V5E.mesh, V5E.compute)
    assert used("v5e:4x4", mesh__data="2")[1] == MeshConfig(data=2, fsdp=4)  # the axes depend on one another
    assert used("v5e:4x4", stage__context="4")[1] == MeshConfig(data=1, fsdp=4, context=4)
    assert used("v5e:4x4", topology="2 x v5p:2x2x4")[1] == V5P.mesh
    assert used("v5e:4x4", topology="none") == (FIRST.accumulation, RECIPE.mesh, RECIPE.compute)


def test_what_is_recorded_is_what_is_used():
    given = {"compute.remat": "dots", "stages.first.accumulation": "8"}
    recipe = on_topology(codec.override(RECIPE, given), "v5e:4x4", given)
    again = codec.from_dict(Recipe, json.loads(json.dumps(codec.to_dict(recipe))))
    assert again == recipe
    assert again.topology == "v5e:4x4"
    assert again.settings_of(again.stages[0]).compute.remat is Remat.DOTS


def test_settings_are_fields_with_paths():
    path = "stages.first.settings.2 x v5p:2x2x4.compute.remat"
    assert codec.override(RECIPE, {path: "layer"}).stages[0].settings[1].compute.remat is Remat.LAYER
    assert path in {leaf.path for leaf in codec.leaves(RECIPE)}
    with pytest.raises(UserError, match=r"unknown field .*settings.v5e:4x5.accumulation'; did you mean"):
        codec.override(RECIPE, {"stages.first.settings.v5e:4x5.accumulation": "2"})


def test_a_recipe_without_the_new_fields_is_loaded():
    values = codec.to_dict(RECIPE)
    del values["topology"]
    for stage in values["stages"]:
        del stage["settings"]
    old = codec.from_dict(Recipe, values)
    assert known_topologies(old) == ()
    assert old.compute_of(old.stages[0]) == RECIPE.compute


def test_what_is_said():
    assert settings_in_use(on_topology(RECIPE, "v5e:4x4")) == "using the recipe's settings for v5e:4x4 in first"
    whole = dataclasses.replace(RECIPE, stages=(FIRST,))
    assert settings_in_use(on_topology(whole, "v5e:4x4")) == "using the recipe's settings for v5e:4x4"
    assert settings_in_use(on_topology(RECIPE, "cpu:8")) == (
        "note: recipe r has no settings for cpu:8 (only for v5e:4x4, 2 x v5p:2x2x4); using its compute and mesh"
    )
    given = {"topology": "none"}
    assert settings_in_use(on_topology(codec.override(RECIPE, given), "v5e:4x4", given)) is None
    assert settings_in_use(on_topology(dataclasses.replace(RECIPE, stages=(LAST,)), "cpu:8")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"topology": "v5e:4x5"},
            "no stage of recipe 'r' has settings for topology 'v5e:4x5'; did you mean 'v5e:4x4'?",
        ),
        ({"stage.accumulation": "5"}, "stages.first.accumulation=5 does not divide stages.first.batch_size=64"),
        ({"compute.gather": "per_layer"}, "set compute.gather=per_step, or compute.reduce=loop"),
        ({"stage.context": "3"}, "3 devices cannot share a sequence"),
    ],
)
def test_what_does_not_go_together(change, message):
    with pytest.raises(UserError) as error:
        on_topology(codec.override(RECIPE, change), "v5e:4x4", change)
    assert message in str(error.value)


@pytest.mark.parametrize("topology", ["", "v5e", "v5e:", "v5e:4*4", "v5e:0x4", "0 x v5e:4x4", "2xv5e:4x4", "v5e:4x4 "])
def test_a_topology_has_a_form(topology):
    with pytest.raises(UserError, match=r"settings.topology must look like v5e:16x16, 2 x v5p:4x8x8 or cpu:8, not"):
        dataclasses.replace(V5E, topology=topology)


def test_mistakes_in_settings_are_named():
    with pytest.raises(UserError, match=r"settings.v5e:4x4.accumulation must be at least 1, not 0"):
        dataclasses.replace(V5E, accumulation=0)
    with pytest.raises(UserError, match=r"stages.first.settings name a topology twice"):
        dataclasses.replace(FIRST, settings=(V5E, V5E))
    values = codec.to_dict(RECIPE)
    values["stages"][0]["settings"][0]["remat"] = "layer"
    with pytest.raises(UserError, match=r"unknown field 'stages.0.settings.0.remat'"):
        codec.from_dict(Recipe, values)
    del values["stages"][0]["settings"][0]["remat"], values["stages"][0]["settings"][0]["mesh"]
    with pytest.raises(UserError, match=r"missing field 'stages.0.settings.0.mesh'"):
        codec.from_dict(Recipe, values)


def test_settings_of_a_topology_are_replaced():
    faster = dataclasses.replace(V5E, accumulation=2)
    assert with_settings(FIRST, faster).settings == (V5P, faster)
    assert with_settings(LAST, V5E).settings == (V5E,)


@pytest.mark.parametrize("name", RECIPES)
def test_settings_of_every_recipe_divide_over_their_devices(name):
    """At the full size; a tiny recipe has none."""
    recipe = named_recipe(name)
    for topology in known_topologies(recipe):
        chosen = on_topology(recipe, topology)
        slices, _, shape = topology.rpartition(" x ")
        devices = int(slices or 1)
        for size in shape.partition(":")[2].split("x"):
            devices *= int(size)
        for stage in filter(chosen.settings_of, chosen.stages):
            mesh = chosen.mesh_of(stage)
            assert mesh.data * mesh.fsdp * mesh.tensor * mesh.context == devices
            assert stage.batch_size % (stage.accumulation * mesh.data * mesh.fsdp) == 0
            assert stage.sequence_length % mesh.context == 0
            assert recipe.model.num_heads % (mesh.tensor * mesh.context) == 0
    assert known_topologies(scaled(recipe, Scale.TINY)) == ()
