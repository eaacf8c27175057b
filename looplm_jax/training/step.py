"""One train step: gradients of the stage's objective, accumulated, clipped, guarded and applied."""

import dataclasses
from collections.abc import Callable
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from looplm_jax.config import Gather, Objective, PriorKind, Recipe, Stage
from looplm_jax.halting.priors import log_prior
from looplm_jax.losses import Stage1Metrics, stage1, stage1_from_hidden, stage2, token_losses
from looplm_jax.models.looplm import LoopLM, LoopLMOutput, Params, gather_stacks, head_matrix
from looplm_jax.training.guard import is_sound, update_guard
from looplm_jax.training.optimizer import direction, learning_rate
from looplm_jax.training.state import TrainState, split_params


@flax.struct.dataclass
class DeviceBatch:
    """A batch on the devices: `A` parts that are accumulated, of `B` sequences each."""

    tokens: Int[Array, "A B S"]
    targets: Int[Array, "A B S"]
    segment_ids: Int[Array, "A B S"]
    positions: Int[Array, "A B S"]
    loss_mask: Float[Array, "A B S"]


@flax.struct.dataclass
class StepMetrics:
    """What a step reports; means over the batch's unmasked tokens."""

    loss: Float[Array, ""]
    exits: Stage1Metrics
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


TrainStep = Callable[[TrainState, DeviceBatch], tuple[TrainState, StepMetrics]]


def make_train_step(recipe: Recipe, model: LoopLM, stage: Stage, *, first_step: int, loops: int) -> TrainStep:
    """The step of a stage that begins at `first_step` of the run, at a number of loops.

    To be jitted with its state donated.
    """

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        moving, frozen = split_params(state.params, stage.trained_groups)
        loss, exits, gradients = _accumulate(model, stage, loops, moving, frozen, batch)
        norm = optax.tree.norm(gradients)
        rate = learning_rate(stage, state.step - first_step)
        updates, optimizer_state = direction(recipe.optimizer, gradients, state.optimizer, moving)
        updated = jax.tree.map(lambda weight, update: weight - rate * update, moving, updates)

        # Without a token to learn from the loss is 0 and says nothing: the step changes nothing, the guard included.
        has_targets = jnp.any(batch.loss_mask != 0)
        sound = is_sound(recipe.guard, state.guard, loss, norm)
        guard = _choose(has_targets, update_guard(state.guard, loss, sound), state.guard)
        applied = sound & has_targets
        next_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params={**frozen, **_choose(applied, updated, moving)},
            optimizer=_choose(applied, optimizer_state, state.optimizer),
            guard=guard,
        )
        return next_state, StepMetrics(
            loss=loss,
            exits=exits,
            gradient_norm=norm,
            learning_rate=rate,
            tokens=jnp.sum(batch.loss_mask, dtype=jnp.int32),
            skipped=guard.skipped,
            skipped_in_a_row=guard.skipped_in_a_row,
        )

    return train_step


def _accumulate(
    model: LoopLM, stage: Stage, loops: int, moving: Params, frozen: Params, batch: DeviceBatch
) -> tuple[Float[Array, ""], Stage1Metrics, Params]:
    """Loss, metrics and gradients over all parts of a batch, each part counting by its unmasked tokens."""
    copies = gather_stacks(model, {**frozen, **moving}) if model.compute.gather is Gather.PER_STEP else {}

    def objective(moving: Params, part: DeviceBatch) -> tuple[Array, Stage1Metrics]:
        variables = {"params": {**frozen, **moving}, "gathered": copies}
        return _OBJECTIVES[stage.objective](model, stage, loops, variables, part)

    def over_part(part: DeviceBatch) -> PyTree:
        (loss, exits), gradients = jax.value_and_grad(objective, has_aux=True)(moving, part)
        return loss, exits, gradients

    if stage.accumulation == 1:
        return over_part(jax.tree.map(lambda x: x[0], batch))
    counts = jnp.sum(batch.loss_mask, axis=(1, 2), dtype=jnp.float32)
    shares = counts / jnp.maximum(jnp.sum(counts), 1.0)

    def add(total: PyTree, part_and_share: tuple[DeviceBatch, Array]) -> tuple[PyTree, None]:
        part, share = part_and_share
        return jax.tree.map(lambda a, b: a + share * b, total, over_part(part)), None

    shapes = jax.eval_shape(over_part, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (batch, shares))[0]


def _expected_loss(
    model: LoopLM, stage: Stage, loops: int, variables: dict[str, Params], part: DeviceBatch
) -> tuple[Float[Array, ""], Stage1Metrics]:
    output = _apply(model, variables, part, loops)
    prior = None if stage.prior.kind is PriorKind.UNIFORM else log_prior(stage.prior, loops)
    return stage1_from_hidden(
        output.hidden,
        head_matrix(variables["params"], model.config),
        part.targets,
        output.gate_logits,
        beta=stage.beta,
        mask=part.loss_mask,
        log_prior=prior,
        chunk=model.compute.loss_chunk,
    )


def _gate_loss(
    model: LoopLM, stage: Stage, loops: int, variables: dict[str, Params], part: DeviceBatch
) -> tuple[Float[Array, ""], Stage1Metrics]:
    output = _apply(model, variables, part, loops)
    head = head_matrix(variables["params"], model.config)
    losses = jax.lax.stop_gradient(token_losses(output.hidden, head, part.targets, chunk=model.compute.loss_chunk))
    loss, _ = stage2(
        losses,
        output.gate_logits,
        k=stage.gain_slope,
        gamma=stage.gain_threshold,
        mask=part.loss_mask,
        target=stage.gate_target,
    )
    _, exits = stage1(losses, jax.lax.stop_gradient(output.gate_logits), beta=0.0, mask=part.loss_mask)
    return loss, exits


def _last_loss(
    model: LoopLM, stage: Stage, loops: int, variables: dict[str, Params], part: DeviceBatch
) -> tuple[Float[Array, ""], Stage1Metrics]:
    output = _apply(model, variables, part, loops)
    return stage1_from_hidden(
        output.hidden,
        head_matrix(variables["params"], model.config),
        part.targets,
        jnp.full_like(output.gate_logits, _NEVER),
        beta=0.0,
        mask=part.loss_mask,
        chunk=model.compute.loss_chunk,
    )


_NEVER = -1e9  # gate logit of a token that does not leave before the last loop; finite, so that its entropy is 0
_OBJECTIVES = {
    Objective.EXPECTED_LOSS: _expected_loss,
    Objective.GATE: _gate_loss,
    Objective.LAST_LOSS: _last_loss,
}


def _apply(model: LoopLM, variables: dict[str, Params], part: DeviceBatch, loops: int) -> LoopLMOutput:
    output = model.apply(variables, part.tokens, loops=loops, positions=part.positions, segment_ids=part.segment_ids)
    return cast(LoopLMOutput, output)


def _choose(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
