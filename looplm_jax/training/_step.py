"""The train step: gradients of the stage's objective, accumulated, clipped, guarded and applied."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from looplm_jax.config import InitialState, Objective, Recipe, Stage
from looplm_jax.losses import LoopRPTMetrics, Stage1Metrics, updated_teacher
from looplm_jax.models._looplm import LoopLM
from looplm_jax.random_keys import from_raw
from looplm_jax.training._draws import Draws, draw_step
from looplm_jax.training._gradients import Examples, LossOf, PolicyMetrics, Sums, Totals, Variables, loss_and_gradients
from looplm_jax.training._guard import is_accepted, update_guard
from looplm_jax.training._looprpt import looprpt_loss, scored_batch
from looplm_jax.training._objectives import expected_loss, gate_loss, last_loss, ponder_loss, with_noise
from looplm_jax.training._optimizer import axes_of, direction, learning_rate
from looplm_jax.training._policy import policy_loss, prepared_rollouts, replaying
from looplm_jax.training._state import TrainState, split_params

_NOISE = 0x6E6F6973  # distinguishes the random numbers of tokens from other choices of the run


@flax.struct.dataclass
class StepMetrics:
    """The metrics of a step; means over the unmasked tokens of the batch.

    With the objective `last_loss`, the losses of earlier loops are computed only at steps that are logged, and are 0 at
    others. With `read_out=last` there are none: the only loss is that of the last loop of each sequence.

    Attributes:
      loss: the loss that is trained.
      exits: losses per loop and statistics of the exit distribution; None for a policy gradient.
      looprpt: the metrics that only the objective `looprpt` has, means over hard tokens; else None.
      policy: the metrics that only the objective `policy_gradient` has; else None.
      means: further means, by their names in `metrics.jsonl`: those of the objective `ponder`.
      gradient_norm: the global norm of the gradients before clipping.
      learning_rate: the learning rate.
      tokens: the number of unmasked tokens.
      skipped: the number of steps skipped since the run began.
      skipped_in_a_row: the number of steps skipped since the last accepted one.
    """

    loss: Float[Array, ""]
    exits: Stage1Metrics | None
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    looprpt: LoopRPTMetrics | None = None
    policy: PolicyMetrics | None = None
    means: dict[str, Float[Array, ""]] = flax.struct.field(default_factory=dict)


TrainStep = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
"""A function of a state and a batch, `Batch` or, for a policy gradient, `RolloutBatch`."""


def make_train_step(recipe: Recipe, model: LoopLM, stage: Stage, *, first_step: int, loops: int) -> TrainStep:
    """Returns the train step of a stage, to be jitted with its state donated.

    Args:
      recipe: the configuration of the run.
      model: the model.
      stage: the stage.
      first_step: the number of steps of the run before the stage.
      loops: the number of loops; not used if the batch has the number of each sequence (`read_out=last`).
    """
    updates = stage.policy.updates if stage.objective is Objective.POLICY_GRADIENT else 1

    def train_step(state: TrainState, batch: Examples) -> tuple[TrainState, StepMetrics]:
        examples, totals = _examples(model, stage, loops, state, batch)

        def update(state: TrainState, _: None) -> tuple[TrainState, StepMetrics]:
            return _updated(recipe, model, stage, state, examples, totals, first_step=first_step, loops=loops)

        if updates == 1:
            state, metrics = update(state, None)
        else:
            # The metrics of the first update, which is on policy, with the counters of the last one.
            state, every = jax.lax.scan(update, state, length=updates)
            metrics = dataclasses.replace(
                jax.tree.map(lambda x: x[0], every),
                skipped=state.guard.skipped,
                skipped_in_a_row=state.guard.skipped_in_a_row,
            )
        return dataclasses.replace(state, step=state.step + 1), metrics

    return train_step


def _examples(model: LoopLM, stage: Stage, loops: int, state: TrainState, batch: Examples) -> tuple[Examples, Totals]:
    """Returns a batch with what its objective needs in addition, and its totals."""
    match stage.objective:
        case Objective.LOOPRPT:
            return scored_batch(model, stage, loops, state, batch)
        case Objective.POLICY_GRADIENT:
            return prepared_rollouts(replaying(model), stage, loops, state, batch)
        case _:
            tokens = jnp.sum(batch.loss_mask, dtype=jnp.float32)
            examples: Examples = batch
            if model.config.initial_state is InitialState.NOISE or stage.jacobian.weight:
                examples = with_noise(batch, jax.random.fold_in(from_raw(state.key), _NOISE), state.step)
            return examples, Totals(count=tokens, tokens=tokens)


def _updated(
    recipe: Recipe,
    model: LoopLM,
    stage: Stage,
    state: TrainState,
    examples: Examples,
    totals: Totals,
    *,
    first_step: int,
    loops: int,
) -> tuple[TrainState, StepMetrics]:
    """Returns the state after one update of the parameters, at the same step, and the metrics before it."""
    # Only `moving` is differentiated, so no gradients of frozen parameters are computed.
    moving, frozen = split_params(state.params, stage.trained_groups)
    logged = is_logged(recipe, state.step + 1)
    if stage.objective is Objective.POLICY_GRADIENT:
        model = replaying(model)

    draws = draw_step(stage, state.key, state.step, first_step)
    loss_of = _objective(model, stage, loops, logged, draws)
    (loss, measured), gradients = loss_and_gradients(
        loss_of, model, moving, frozen, examples, totals, second_order=draws.penalized is not None
    )

    # The norm before clipping is the one that the guard compares and the log shows.
    norm = optax.tree.norm(gradients)

    # The schedule is that of the stage, so it counts from the first step of the stage.
    rate = learning_rate(stage, state.step - first_step)
    axes = axes_of(model.config, moving)
    updates, optimizer_state = direction(recipe.optimizer, axes, gradients, state.optimizer, moving)
    updated = jax.tree.map(lambda weight, update: weight - rate * update, moving, updates)

    # Without a token to learn from the loss is 0 and meaningless: the step changes nothing, including the guard.
    has_targets = totals.count != 0
    accepted = is_accepted(recipe.guard, state.guard, loss, norm)
    guard = _choose(has_targets, update_guard(state.guard, loss, accepted), state.guard)
    applied = accepted & has_targets

    # A skipped step keeps the old parameters, optimizer state and teacher.
    teacher = state.teacher
    if teacher is not None and stage.objective is Objective.LOOPRPT:
        teacher = _choose(applied, updated_teacher(teacher, updated, stage.looprpt.teacher_decay), teacher)

    next_state = dataclasses.replace(
        state,
        params={**frozen, **_choose(applied, updated, moving)},
        optimizer=_choose(applied, optimizer_state, state.optimizer),
        guard=guard,
        teacher=teacher,
    )

    return next_state, StepMetrics(
        loss=loss,
        exits=measured.exits,
        looprpt=measured.looprpt,
        policy=measured.policy,
        means=measured.means,
        gradient_norm=norm,
        learning_rate=rate,
        tokens=totals.tokens.astype(jnp.int32),
        skipped=guard.skipped,
        skipped_in_a_row=guard.skipped_in_a_row,
    )


def _objective(model: LoopLM, stage: Stage, loops: int, logged: bool | Bool[Array, ""], draws: Draws) -> LossOf:
    """Returns the objective of the stage as a function of a microbatch."""

    def loss_of(variables: Variables, microbatch: Examples, totals: Totals) -> Sums:
        match stage.objective:
            case Objective.EXPECTED_LOSS:
                return expected_loss(model, stage, loops, variables, microbatch, totals)
            case Objective.GATE:
                return gate_loss(model, stage, loops, variables, microbatch, totals)
            case Objective.LAST_LOSS:
                return last_loss(model, stage, loops, variables, microbatch, totals, logged, draws)
            case Objective.PONDER:
                return ponder_loss(model, stage, loops, variables, microbatch, totals)
            case Objective.LOOPRPT:
                return looprpt_loss(model, stage, loops, variables, microbatch, totals)
            case Objective.POLICY_GRADIENT:
                return policy_loss(model, stage, loops, variables, microbatch, totals)

    return loss_of


def is_logged(recipe: Recipe, step: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
    """Whether the metrics of a step, counted from 1, are logged."""
    return (step % recipe.log_every == 0) | (step == recipe.total_steps)


def _choose(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """Returns the tree `new` if the condition holds, or else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
