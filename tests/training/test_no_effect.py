import dataclasses

import pytest
from training_cases import GATE, RECIPE, STAGE, one_stage

from looplm_jax.config import EvaluationConfig, Objective, PriorConfig, PriorKind, Schedule
from looplm_jax.recipes import RECIPES, Scale, named_recipe, scaled
from looplm_jax.training._notes import settings_without_effect


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scale", Scale)
def test_every_field_of_our_recipes_has_an_effect(name, scale):
    assert settings_without_effect(scaled(named_recipe(name), scale)) == []


@pytest.mark.parametrize(
    ("stage", "changes", "notes"),
    [
        (
            STAGE,
            {"schedule": Schedule.CONSTANT, "final_learning_rate": 1e-9, "decay_steps": 2},
            ["stages.pretrain: decay_steps=2 and final_learning_rate=1e-09 have no effect with schedule=constant"],
        ),
        (STAGE, {"decay_steps": 2}, ["stages.pretrain: decay_steps=2 has no effect with schedule=cosine"]),
        (
            STAGE,
            {"schedule": Schedule.WARMUP_STABLE_DECAY, "final_learning_rate": 1e-3},
            [
                "stages.pretrain: final_learning_rate=0.001 has no effect with decay_steps=0",
                "stages.pretrain: schedule=warmup_stable_decay never decays: decay_steps=0",
            ],
        ),
        (STAGE, {"schedule": Schedule.WARMUP_STABLE_DECAY, "decay_steps": 1}, []),
        (
            STAGE,
            {"warmup_steps": 6},
            ["stages.pretrain: schedule=cosine never decays: warmup_steps=6 leaves none of steps=6"],
        ),
        (STAGE, {"gain_slope": 3.0}, ["stages.pretrain: gain_slope=3.0 has no effect with objective=expected_loss"]),
        (GATE, {"gain_slope": 3.0}, []),
        (GATE, {"beta": 0.3}, ["stages.gate: beta=0.3 has no effect with objective=gate"]),
        (
            STAGE,
            {"objective": Objective.LAST_LOSS, "prior": PriorConfig(kind=PriorKind.GEOMETRIC)},
            ["stages.pretrain: prior=(...) has no effect with objective=last_loss"],
        ),
        (
            STAGE,
            {"prior": PriorConfig(kind=PriorKind.GEOMETRIC, mean=2.0)},
            ["stages.pretrain.prior: mean=2.0 has no effect with kind=geometric"],
        ),
    ],
)
def test_fields_that_do_nothing_together_are_named(stage, changes, notes):
    recipe = one_stage(dataclasses.replace(stage, **changes))
    assert settings_without_effect(recipe) == [f"note: {note}" for note in notes]


def test_evaluation_needs_something_held_out():
    recipe = dataclasses.replace(
        RECIPE,
        data=dataclasses.replace(RECIPE.data, validation_fraction=0.0),
        evaluation=EvaluationConfig(every=3),
    )
    assert settings_without_effect(recipe) == [
        "note: evaluation: every=3 has no effect with data.validation_fraction=0"
    ]
