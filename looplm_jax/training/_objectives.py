"""The objectives of Stage I, of Stage II, of the last loop and of ACT, each as a function of a microbatch.

Their losses and metrics are sums over the microbatch, divided by the number of unmasked tokens of the whole batch.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from looplm_jax.config import Gradient, PriorKind, Stage
from looplm_jax.data._packing import Batch, DepthBatch
from looplm_jax.halting import mean_exit_loop
from looplm_jax.halting._priors import log_prior
from looplm_jax.losses import (
    Stage1Metrics,
    jacobian_penalty,
    stage1,
    stage1_from_hidden,
    stage2,
    token_losses,
    weighted_token_losses,
)
from looplm_jax.losses._masking import mean_weights
from looplm_jax.models._drawn_depth import last_loop
from looplm_jax.models._equilibrium import equilibrium, loop_of
from looplm_jax.models._looplm import LoopLM, LoopLMOutput
from looplm_jax.models._mixed_loops import mixed_loops
from looplm_jax.models._modulation import LoopTime
from looplm_jax.random_keys import seeded_key
from looplm_jax.training._draws import Draws, ShortPass
from looplm_jax.training._gradients import ObjectiveMetrics, Sums, Totals, Variables


def expected_loss(
    model: LoopLM, stage: Stage, loops: int, variables: Variables, microbatch: Batch[Array], totals: Totals
) -> Sums:
    """Returns the Stage I loss (Eq. 4) of a microbatch, and its metrics."""
    output = apply(model, variables, microbatch, loops)
    prior = None if stage.prior.kind is PriorKind.UNIFORM else log_prior(stage.prior, loops)

    loss, exits = stage1_from_hidden(
        output.hidden,
        head_weights(model, variables),
        microbatch.targets,
        output.gate_logits,
        beta=stage.beta,
        mask=microbatch.loss_mask,
        count=totals.count,
        log_prior=prior,
        chunk=model.compute.loss_chunk,
    )
    return loss, ObjectiveMetrics(exits)


def gate_loss(
    model: LoopLM, stage: Stage, loops: int, variables: Variables, microbatch: Batch[Array], totals: Totals
) -> Sums:
    """Returns the Stage II loss (Eq. 6) of a microbatch, and its metrics.

    The losses of the tokens are constants, so the backward pass reaches only the gate.
    """
    output = apply(model, variables, microbatch, loops)
    head = head_weights(model, variables)
    losses = jax.lax.stop_gradient(
        token_losses(output.hidden, head, microbatch.targets, chunk=model.compute.loss_chunk)
    )

    loss, _ = stage2(
        losses,
        output.gate_logits,
        k=stage.gain_slope,
        gamma=stage.gain_threshold,
        mask=microbatch.loss_mask,
        count=totals.count,
        target=stage.gate_target,
    )
    # Stage I without its entropy term, for the metrics only.
    _, exits = stage1(
        losses, jax.lax.stop_gradient(output.gate_logits), beta=0.0, mask=microbatch.loss_mask, count=totals.count
    )
    return loss, ObjectiveMetrics(exits)


def last_loss(
    model: LoopLM,
    stage: Stage,
    loops: int,
    variables: Variables,
    microbatch: Batch[Array],
    totals: Totals,
    logged: bool | Bool[Array, ""],
    draws: Draws,
) -> Sums:
    """Returns the loss after the last loop: Eq. 4 for that loop alone. The last gate does not influence it.

    Args:
      model: the model.
      stage: the stage.
      loops: the number of loops; not used if the microbatch has that of each sequence.
      variables: the parameters of the model.
      microbatch: the microbatch.
      totals: the totals of its batch.
      logged: whether the losses of earlier loops are computed, for the metrics.
      draws: the random choices of the step.
    """
    if isinstance(microbatch, DepthBatch):
        return _last_loss_of_depths(model, stage, variables, microbatch, totals, draws)

    output = apply(model, variables, microbatch, loops)
    head, chunk = head_weights(model, variables), model.compute.loss_chunk

    loss, last = stage1_from_hidden(
        output.hidden[-1:],
        head,
        microbatch.targets,
        output.gate_logits[-1:],
        beta=0.0,
        mask=microbatch.loss_mask,
        count=totals.count,
        chunk=chunk,
    )

    if loops == 1:
        return loss, ObjectiveMetrics(last)

    # Each of them needs a product with the head, over the whole vocabulary.
    def earlier_losses(hidden: Float[Array, "t B S D"], head: Float[Array, "D V"]) -> Float[Array, "t"]:
        losses = token_losses(hidden, head, microbatch.targets, chunk=chunk)
        return stage1(losses, jnp.zeros_like(losses), beta=0.0, mask=microbatch.loss_mask, count=totals.count)[
            1
        ].loss_per_loop

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
    return loss, ObjectiveMetrics(exits)


def _last_loss_of_depths(
    model: LoopLM,
    stage: Stage,
    variables: Variables,
    microbatch: DepthBatch[Array],
    totals: Totals,
    draws: Draws,
) -> Sums:
    """Returns the loss after the last loop of each sequence, which has its own number of loops."""
    arrays = _arrays_of(microbatch)
    means: dict[str, Float[Array, ""]] = {}
    if stage.gradient is Gradient.IMPLICIT:
        solved = equilibrium(model, variables, microbatch.tokens, solver=stage.solver, **arrays)
        state, hidden, depths = solved.state, solved.hidden, solved.solution.evaluations
        means["solver_loops"] = jnp.sum(depths.astype(jnp.float32)) / stage.batch_size
        means["solver_residual"] = jnp.sum(solved.solution.residual) / stage.batch_size
    else:
        depths = microbatch.depths[:, 0]
        output = last_loop(
            model,
            variables,
            microbatch.tokens,
            depths,
            most=stage.deepest,
            backprop_loops=stage.backprop_loops,
            damping=stage.damping,
            **arrays,
        )
        state, hidden = output.state, output.hidden

    loss, last = _loss_of_only_exit(model, variables, microbatch, totals, hidden)
    # There is one exit, which `last` counts as loop 1.
    weights = mean_weights(microbatch.loss_mask, totals.count, microbatch.tokens.shape)
    mean_depth = jnp.sum(weights * depths[:, None].astype(jnp.float32))

    if draws.short is not None:
        of_short, of_state = _shortcut(model, stage, variables, microbatch, totals, draws.short, hidden)
        loss = loss + stage.shortcut.weight_loss * of_short + stage.shortcut.weight_state * of_state
        means |= {"shortcut_loss": of_short, "shortcut_state": of_state}

    if draws.penalized is not None:
        penalty = jax.lax.cond(
            draws.penalized,
            lambda: _jacobian_penalty(model, stage, variables, microbatch, state, depths),
            lambda: jnp.zeros(()),
        )
        loss = loss + stage.jacobian.weight * penalty
        # NaN becomes null in the log: at other steps the penalty is not known.
        means["jacobian"] = jnp.where(draws.penalized, jax.lax.stop_gradient(penalty), jnp.nan)

    return loss, ObjectiveMetrics(dataclasses.replace(last, mean_exit_loop=mean_depth), means=means)


def _arrays_of(microbatch: Batch[Array]) -> dict[str, Any]:
    """Returns the arguments of `last_loop` and `equilibrium` that belong to the tokens."""
    return {
        "positions": microbatch.positions,
        "segment_ids": microbatch.segment_ids,
        "noise_seeds": _noise_seeds(microbatch),
    }


def _loss_of_only_exit(
    model: LoopLM, variables: Variables, microbatch: Batch[Array], totals: Totals, hidden: Float[Array, "B S D"]
) -> tuple[Float[Array, ""], Stage1Metrics]:
    """Returns the loss of states that are read out once. A gate does not influence it."""
    return stage1_from_hidden(
        hidden[None],
        head_weights(model, variables),
        microbatch.targets,
        jnp.zeros((1, *microbatch.tokens.shape)),
        beta=0.0,
        mask=microbatch.loss_mask,
        count=totals.count,
        chunk=model.compute.loss_chunk,
    )


def _shortcut(
    model: LoopLM,
    stage: Stage,
    variables: Variables,
    microbatch: Batch[Array],
    totals: Totals,
    short: ShortPass,
    hidden: Float[Array, "B S D"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the loss of a pass with fewer loops, and the mean square of its distance from the states of all loops.

    These are constants (LoopFormer, arXiv 2602.11451).
    """
    output = last_loop(
        model,
        variables,
        microbatch.tokens,
        jnp.broadcast_to(short.loops, microbatch.tokens.shape[:1]),
        most=stage.loops - 1,
        steps=short.steps,
        **_arrays_of(microbatch),
    )
    loss, _ = _loss_of_only_exit(model, variables, microbatch, totals, output.hidden)

    distance = output.hidden.astype(jnp.float32) - jax.lax.stop_gradient(hidden).astype(jnp.float32)
    weights = mean_weights(microbatch.loss_mask, totals.count, microbatch.tokens.shape)
    return loss, jnp.sum(weights * jnp.mean(jnp.square(distance), axis=-1))


def _jacobian_penalty(
    model: LoopLM,
    stage: Stage,
    variables: Variables,
    microbatch: Batch[Array],
    state: Float[Array, "B S D"],
    depths: Int[Array, "B"],
) -> Float[Array, ""]:
    """Returns the sum of the penalties of the sequences of a microbatch, divided by the sequences of a step."""
    loop = loop_of(
        model,
        variables,
        microbatch.tokens,
        depths - 1,
        positions=microbatch.positions,
        segment_ids=microbatch.segment_ids,
        time=LoopTime.even(depths - 1, depths),
    )
    penalty = jacobian_penalty(
        loop,
        state,
        _normals(cast(NoisyBatch, microbatch).noise_seeds, state.shape[-1]),
        norm=stage.jacobian.kind,
        iterations=stage.jacobian.iterations,
        per_row=True,
    )
    return penalty * (state.shape[0] / stage.batch_size)


def _normals(seeds: UInt32[Array, "B S"], width: int) -> Float[Array, "B S D"]:
    """Returns normal draws, which are other ones than those of the first states from the same seeds."""

    def of_token(seed: UInt32[Array, ""]) -> Float[Array, "D"]:
        return jax.random.normal(jax.random.fold_in(seeded_key(1), seed), (width,), jnp.float32)

    return jax.vmap(jax.vmap(of_token))(seeds)


def ponder_loss(
    model: LoopLM, stage: Stage, loops: int, variables: Variables, microbatch: Batch[Array], totals: Totals
) -> Sums:
    """Returns the loss of the mixed states of a microbatch plus the cost of their loops (ACT), and its metrics.

    There is one loss, that of the mix. The exit distribution is that of the halting weights.
    """
    output = mixed_loops(
        model,
        variables,
        microbatch.tokens,
        loops=loops,
        epsilon=stage.act_epsilon,
        positions=microbatch.positions,
        segment_ids=microbatch.segment_ids,
        noise_seeds=_noise_seeds(microbatch),
    )
    of_tokens = mean_weights(microbatch.loss_mask, totals.count, microbatch.tokens.shape)
    loss, _ = weighted_token_losses(
        output.hidden[None],
        head_weights(model, variables),
        microbatch.targets,
        of_tokens[None],
        chunk=model.compute.loss_chunk,
    )
    # The number of loops has no gradient. That of the remainder makes earlier halting cheaper.
    loops_run = jnp.sum(of_tokens * output.updates.astype(jnp.float32))
    ponder = loops_run + jnp.sum(of_tokens * output.remainders)

    weights = jax.lax.stop_gradient(output.weights)
    exits = Stage1Metrics(
        loss_per_loop=loss[None],
        exit_pdf=jnp.sum(weights * of_tokens[None], axis=(1, 2)),
        expected_loss=loss,
        exit_entropy=jnp.sum(of_tokens * jnp.sum(jax.scipy.special.entr(weights), axis=0)),
        mean_exit_loop=jnp.sum(of_tokens * mean_exit_loop(weights)),
    )
    means = {"ponder_cost": ponder, "loops_run": loops_run}
    return loss + stage.ponder_weight * ponder, ObjectiveMetrics(exits, means=means)


# The model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NoisyBatch(Batch[Array]):
    """A batch with a seed for each token, of the noise from which its state starts and of other random directions."""

    noise_seeds: UInt32[Array, "*A B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NoisyDepthBatch(NoisyBatch, DepthBatch[Array]):
    """A noisy batch of sequences with their own numbers of loops."""


def with_noise(batch: Batch[Array], key: PRNGKeyArray, step: Int[Array, ""]) -> NoisyBatch:
    """Returns the batch with a random seed for each token, which differs from step to step."""
    # One global array, so that the seeds are the same on any mesh.
    seeds = jax.random.bits(jax.random.fold_in(key, step), batch.tokens.shape)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return (NoisyDepthBatch if isinstance(batch, DepthBatch) else NoisyBatch)(**fields, noise_seeds=seeds)


def _noise_seeds(microbatch: Batch[Array]) -> UInt32[Array, "B S"] | None:
    """Returns the seeds of the noise of a microbatch, or None if its states do not start from noise."""
    return microbatch.noise_seeds if isinstance(microbatch, NoisyBatch) else None


def head_weights(model: LoopLM, variables: Variables) -> Float[Array, "D V"]:
    """Returns the matrix from hidden states to logits."""
    return cast(Array, model.apply(variables, method="head_weights"))


def apply(model: LoopLM, variables: Variables, microbatch: Batch[Array], loops: int, **noise: Any) -> LoopLMOutput:
    """Runs the model on a microbatch, with noise on its states if the arguments of `LoopLM` for it are given."""
    if isinstance(microbatch, NoisyBatch):
        noise = {**noise, "noise_seeds": microbatch.noise_seeds}
    output = model.apply(
        variables,
        microbatch.tokens,
        loops=loops,
        positions=microbatch.positions,
        segment_ids=microbatch.segment_ids,
        **noise,
    )
    return cast(LoopLMOutput, output)
