"""The train step: gradients of the stage's objective, accumulated, clipped, guarded and applied."""

import dataclasses
from collections.abc import Callable
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from looplm_jax.config import Objective, PriorKind, Recipe, Stage
from looplm_jax.data._packing import Batch
from looplm_jax.halting._priors import log_prior
from looplm_jax.losses import Stage1Metrics, stage1, stage1_from_hidden, stage2, token_losses
from looplm_jax.models._looplm import LoopLM, LoopLMOutput
from looplm_jax.training._gradients import Variables, loss_and_gradients
from looplm_jax.training._guard import is_accepted, update_guard
from looplm_jax.training._optimizer import direction, learning_rate
from looplm_jax.training._state import TrainState, split_params


@flax.struct.dataclass
class StepMetrics:
    """The metrics of a step; means over the unmasked tokens of the batch.

    With the objective `last_loss`, the losses of earlier loops are computed only at steps that are logged, and are 0 at
    others.

    Attributes:
      loss: the loss that is trained.
      exits: losses per loop and statistics of the exit distribution.
      gradient_norm: the global norm of the gradients before clipping.
      learning_rate: the learning rate.
      tokens: the number of unmasked tokens.
      skipped: the number of steps skipped since the run began.
      skipped_in_a_row: the number of steps skipped since the last accepted one.
    """

    loss: Float[Array, ""]
    exits: Stage1Metrics
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


TrainStep = Callable[[TrainState, Batch[Array]], tuple[TrainState, StepMetrics]]


def make_train_step(recipe: Recipe, model: LoopLM, stage: Stage, *, first_step: int, loops: int) -> TrainStep:
    """Returns the train step of a stage, to be jitted with its state donated.

    Args:
      recipe: the configuration of the run.
      model: the model.
      stage: the stage.
      first_step: the number of steps of the run before the stage.
      loops: the number of loops.
    """

    def train_step(state: TrainState, batch: Batch[Array]) -> tuple[TrainState, StepMetrics]:
        # Only `moving` is differentiated, so no gradients of frozen parameters are computed.
        moving, frozen = split_params(state.params, stage.trained_groups)
        logged = is_logged(recipe, state.step + 1)

        def objective(
            variables: Variables, microbatch: Batch[Array], count: Float[Array, ""]
        ) -> tuple[Array, Stage1Metrics]:
            match stage.objective:
                case Objective.EXPECTED_LOSS:
                    return _expected_loss(model, stage, loops, variables, microbatch, count)
                case Objective.GATE:
                    return _gate_loss(model, stage, loops, variables, microbatch, count)
                case Objective.LAST_LOSS:
                    return _last_loss(model, loops, variables, microbatch, count, logged)

        (loss, exits), gradients = loss_and_gradients(objective, model, moving, frozen, batch)

        # The norm before clipping is the one that the guard compares and the log shows.
        norm = optax.tree.norm(gradients)

        # The schedule is that of the stage, so it counts from the first step of the stage.
        rate = learning_rate(stage, state.step - first_step)
        updates, optimizer_state = direction(recipe.optimizer, gradients, state.optimizer, moving)
        updated = jax.tree.map(lambda weight, update: weight - rate * update, moving, updates)

        # Without unmasked tokens the loss is 0 and meaningless: the step changes nothing, including the guard.
        has_targets = jnp.any(batch.loss_mask != 0)
        accepted = is_accepted(recipe.guard, state.guard, loss, norm)
        guard = _choose(has_targets, update_guard(state.guard, loss, accepted), state.guard)
        applied = accepted & has_targets

        # A skipped step keeps the old parameters and optimizer state.
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


def is_logged(recipe: Recipe, step: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
    """Whether the metrics of a step, counted from 1, are logged."""
    return (step % recipe.log_every == 0) | (step == recipe.total_steps)


# Objectives


def _expected_loss(
    model: LoopLM, stage: Stage, loops: int, variables: Variables, microbatch: Batch[Array], count: Float[Array, ""]
) -> tuple[Float[Array, ""], Stage1Metrics]:
    """Returns the Stage I loss (Eq. 4) of a microbatch, and its metrics."""
    output = _apply(model, variables, microbatch, loops)
    prior = None if stage.prior.kind is PriorKind.UNIFORM else log_prior(stage.prior, loops)

    return stage1_from_hidden(
        output.hidden,
        _head(model, variables),
        microbatch.targets,
        output.gate_logits,
        beta=stage.beta,
        mask=microbatch.loss_mask,
        count=count,
        log_prior=prior,
        chunk=model.compute.loss_chunk,
    )


def _gate_loss(
    model: LoopLM, stage: Stage, loops: int, variables: Variables, microbatch: Batch[Array], count: Float[Array, ""]
) -> tuple[Float[Array, ""], Stage1Metrics]:
    """Returns the Stage II loss (Eq. 6) of a microbatch, and its metrics.

    The losses of the tokens are constants, so the backward pass reaches only the gate.
    """
    output = _apply(model, variables, microbatch, loops)
    head = _head(model, variables)
    losses = jax.lax.stop_gradient(
        token_losses(output.hidden, head, microbatch.targets, chunk=model.compute.loss_chunk)
    )

    loss, _ = stage2(
        losses,
        output.gate_logits,
        k=stage.gain_slope,
        gamma=stage.gain_threshold,
        mask=microbatch.loss_mask,
        count=count,
        target=stage.gate_target,
    )
    # Stage I without its entropy term, for the metrics only.
    _, exits = stage1(
        losses, jax.lax.stop_gradient(output.gate_logits), beta=0.0, mask=microbatch.loss_mask, count=count
    )
    return loss, exits


def _last_loss(
    model: LoopLM,
    loops: int,
    variables: Variables,
    microbatch: Batch[Array],
    count: Float[Array, ""],
    logged: bool | Bool[Array, ""],
) -> tuple[Float[Array, ""], Stage1Metrics]:
    """Returns the loss after the last loop: Eq. 4 for that loop alone. The last gate does not influence it."""
    output = _apply(model, variables, microbatch, loops)
    head, chunk = _head(model, variables), model.compute.loss_chunk

    loss, last = stage1_from_hidden(
        output.hidden[-1:],
        head,
        microbatch.targets,
        output.gate_logits[-1:],
        beta=0.0,
        mask=microbatch.loss_mask,
        count=count,
        chunk=chunk,
    )

    if loops == 1:
        return loss, last

    # Each of them needs a product with the head, over the whole vocabulary.
    def earlier_losses(hidden: Float[Array, "t B S D"], head: Float[Array, "D V"]) -> Float[Array, "t"]:
        losses = token_losses(hidden, head, microbatch.targets, chunk=chunk)
        return stage1(losses, jnp.zeros_like(losses), beta=0.0, mask=microbatch.loss_mask, count=count)[1].loss_per_loop

    # A condition inside the compiled program avoids the work at steps that are not logged, without a second program.
    earlier = jax.lax.cond(
        logged,
        earlier_losses,
        lambda *_: jnp.zeros(loops - 1),
        *jax.lax.stop_gradient((output.hidden[:-1], head)),
    )
    # All tokens exit after the last loop. `last` counts it as loop 1, hence the factor `loops`.
    exits = Stage1Metrics(
        loss_per_loop=jnp.concatenate([earlier, last.loss_per_loop]),
        exit_pdf=jnp.zeros(loops).at[-1].set(last.exit_pdf[0]),
        expected_loss=loss,
        exit_entropy=last.exit_entropy,
        mean_exit_loop=loops * last.mean_exit_loop,
    )
    return loss, exits


# Helpers


def _head(model: LoopLM, variables: Variables) -> Float[Array, "D V"]:
    """Returns the matrix from hidden states to logits."""
    return cast(Array, model.apply(variables, method="head_weights"))


def _apply(model: LoopLM, variables: Variables, microbatch: Batch[Array], loops: int) -> LoopLMOutput:
    """Runs the model on a microbatch."""
    output = model.apply(
        variables, microbatch.tokens, loops=loops, positions=microbatch.positions, segment_ids=microbatch.segment_ids
    )
    return cast(LoopLMOutput, output)


def _choose(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """Returns the tree `new` if the condition holds, or else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
