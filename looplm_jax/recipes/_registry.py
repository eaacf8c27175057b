"""Recipes by name, and the same recipes at a smaller scale."""

import dataclasses
import enum
from collections.abc import Callable

from looplm_jax.config import (
    CheckpointConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    Objective,
    PolicyConfig,
    Recipe,
    Stage,
)
from looplm_jax.errors import UserError, suggest
from looplm_jax.recipes._ouro import (
    ouro_1_4b_recipe,
    ouro_1_4b_thinking_recipe,
    ouro_2_6b_recipe,
    ouro_2_6b_thinking_recipe,
)
from looplm_jax.recipes._policy_gradient import grpo, grpo_depth, rltt
from looplm_jax.recipes._reinforcement import looprpt, looprpt_demo
from looplm_jax.recipes._small import demo, demo_one_loop, mano_small, sft, text_small

# Functions, so that only the chosen recipe is created.
RECIPES: dict[str, Callable[[], Recipe]] = {
    "text-small": text_small,
    "demo": demo,
    "demo-one-loop": demo_one_loop,
    "mano-small": mano_small,
    "ouro-1.4b": ouro_1_4b_recipe,
    "ouro-2.6b": ouro_2_6b_recipe,
    "ouro-1.4b-thinking": ouro_1_4b_thinking_recipe,
    "ouro-2.6b-thinking": ouro_2_6b_thinking_recipe,
    "sft": sft,
    "looprpt": looprpt,
    "looprpt-demo": looprpt_demo,
    "grpo": grpo,
    "grpo-depth": grpo_depth,
    "rltt": rltt,
}
"""The recipes by name, as functions that create them."""

_MAX_LENGTH, _MIN_LENGTH = 256, 64  # tokens of a tiny sequence
_STEPS, _SEQUENCES, _NEW_TOKENS = 4, 4, 16


def named_recipe(name: str) -> Recipe:
    """Returns the recipe of a name. Raises UserError, with similar names, if there is none."""
    if name not in RECIPES:
        otherwise = f"; give the path of a .json file, or one of {', '.join(sorted(RECIPES))}"
        raise UserError(f"unknown recipe {name!r}{suggest(name, RECIPES, otherwise)}")
    return RECIPES[name]()


# Scale


class Scale(enum.Enum):
    """The scale of a recipe: full, or about a thousandth of the parameters and a few steps of each stage."""

    FULL = "full"
    TINY = "tiny"


def scaled(recipe: Recipe, scale: Scale) -> Recipe:
    """Returns the recipe at a scale. Losses, loops, schedules, mixtures and rotary bases are unchanged."""
    if scale is Scale.FULL:
        return recipe

    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-tiny",
        model=_tiny_model(recipe.model),
        stages=tuple(map(_tiny_stage, recipe.stages)),
        mesh=MeshConfig(data=1),
        # A tiny run has few documents, of which the fraction of a large one would hold out none.
        data=dataclasses.replace(recipe.data, validation_fraction=max(recipe.data.validation_fraction, 0.02)),
        checkpoint=CheckpointConfig(every=2, keep=2),
        evaluation=EvaluationConfig(every=0, sequences=_SEQUENCES),
        log_every=1,
    )


def _tiny_model(model: ModelConfig) -> ModelConfig:
    """Returns a model with an eighth of the layers and a sixteenth of the width: 1.4B parameters become 0.8M."""
    return dataclasses.replace(
        model,
        # The embedding would be most of the parameters.
        vocab_size=min(model.vocab_size, 1024),
        width=model.width // 16,
        mlp_width=model.mlp_width // 16,
        num_layers=max(model.num_layers // 8, 1),
        num_heads=max(model.num_heads // 4, 1),
        num_kv_heads=model.num_kv_heads // 4,
        max_positions=_MAX_LENGTH,
    )


def _tiny_stage(stage: Stage) -> Stage:
    """Returns a stage of a few steps of a few sequences, whose length is still that of the stage in proportion."""
    warmup = min(stage.warmup_steps, 2)
    return dataclasses.replace(
        stage,
        steps=_STEPS,
        batch_size=_SEQUENCES,
        accumulation=min(stage.accumulation, 2),
        context=0,
        settings=(),
        sequence_length=max(stage.sequence_length // 256, _MIN_LENGTH),
        warmup_steps=warmup,
        decay_steps=min(stage.decay_steps, _STEPS - warmup),
        policy=_tiny_policy(stage),
    )


def _tiny_policy(stage: Stage) -> PolicyConfig:
    """Returns the settings of a policy gradient with short answers; those of other stages have no effect, and stay."""
    if stage.objective is not Objective.POLICY_GRADIENT:
        return stage.policy
    return dataclasses.replace(stage.policy, max_new_tokens=min(stage.policy.max_new_tokens, _NEW_TOKENS))
