"""LoopRPT as the objective of a stage (arXiv 2603.19714): what it computes of the teacher, and of a microbatch.

`losses.looprpt` is the loss. It divides by the number of hard tokens of the whole batch, which the teacher decides.
Therefore the teacher scores the whole batch before any microbatch is differentiated.

Every random draw follows from the key of the step, the number of the rollout and the number of the token in the batch.
It is the same on any mesh, for any number of microbatches, and in a run that resumes.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from looplm_jax.config import Gather, LoopRPTConfig, Stage
from looplm_jax.data._packing import Batch
from looplm_jax.halting._distribution import log_survival
from looplm_jax.losses import (
    NoisyRollouts,
    TeacherScores,
    hard_tokens,
    looprpt,
    stage1,
    token_entropies,
    token_losses,
)
from looplm_jax.models._looplm import LoopLM, Params, gather_stacks, head_matrix
from looplm_jax.random_keys import from_raw
from looplm_jax.training._gradients import ObjectiveMetrics, Sums, Totals, Variables, for_each_microbatch
from looplm_jax.training._objectives import apply, head_weights
from looplm_jax.training._state import TrainState


@flax.struct.dataclass
class ScoredBatch:
    """A batch with the scores of its teacher.

    Attributes:
      batch: the tokens.
      teacher: the scores of the teacher.
      hard: 1 for hard tokens, from which the student learns, and 0 for others.
      numbers: the number of each token in the batch, from which its random draws follow.
    """

    batch: Batch[Array]
    teacher: TeacherScores
    hard: Float[Array, "*A B S"]
    numbers: Int[Array, "*A B S"]


# Before the microbatches


def scored_batch(
    model: LoopLM, stage: Stage, loops: int, state: TrainState, batch: Batch[Array]
) -> tuple[ScoredBatch, Totals]:
    """Returns a batch with the scores of the teacher, and its totals.

    Args:
      model: the model.
      stage: the stage.
      loops: the number of loops.
      state: the state before the step.
      batch: the batch, `[A, B, S]`.
    """
    # The teacher has only the parameters that the stage trains, because the others are the same.
    teacher: Params = {**state.params, **(state.teacher or {})}
    copies = gather_stacks(model, teacher) if model.compute.gather is Gather.PER_STEP else {}
    variables: Variables = {"params": teacher, "gathered": copies}

    def of_microbatch(microbatch: Batch[Array]) -> tuple[TeacherScores, Float[Array, "B S"]]:
        output, chunk = apply(model, variables, microbatch, loops), model.compute.loss_chunk
        head = head_matrix(teacher, model.config)
        entropy = token_entropies(output.hidden[-1:], head, chunk=chunk)[0]
        scores = TeacherScores(
            log_probs=-token_losses(output.hidden, head, microbatch.targets, chunk=chunk),
            gate_logits=output.gate_logits,
            entropy=entropy,
        )
        share = stage.looprpt.hard_share
        return scores, hard_tokens(entropy, microbatch.segment_ids, microbatch.loss_mask, share)

    scores, hard = for_each_microbatch(of_microbatch, batch)

    totals = Totals(
        count=jnp.sum(hard),
        tokens=jnp.sum(batch.loss_mask, dtype=jnp.float32),
        key=jax.random.key_data(jax.random.fold_in(from_raw(state.key), state.step)),
    )
    numbers = jnp.arange(batch.tokens.size, dtype=jnp.int32).reshape(batch.tokens.shape)
    return ScoredBatch(batch=batch, teacher=scores, hard=hard, numbers=numbers), totals


# A microbatch


def looprpt_loss(
    model: LoopLM, stage: Stage, loops: int, variables: Variables, microbatch: ScoredBatch, totals: Totals
) -> Sums:
    """Returns the loss of LoopRPT of a microbatch, and its metrics."""
    batch, config = microbatch.batch, stage.looprpt
    output = apply(model, variables, batch, loops)
    losses = token_losses(output.hidden, head_weights(model, variables), batch.targets, chunk=model.compute.loss_chunk)

    loss, metrics = looprpt(
        -losses,
        output.gate_logits,
        microbatch.teacher,
        _noisy_rollouts(model, config, loops, variables, microbatch, totals),
        mask=microbatch.hard,
        segment_ids=batch.segment_ids,
        vocab_size=model.config.vocab_size,
        hard_share=1.0,  # the mask already contains only the hard tokens
        exit_threshold=config.exit_threshold,
        penalty=config.penalty,
        penalty_scale=config.penalty_scale,
        policy_weight=config.policy_weight,
        representation_weight=config.representation_weight,
        entropy_weight=config.entropy_weight,
        kl_weight=config.kl_weight,
        count=totals.count,
    )

    # Those of Stage I without its entropy term, over all tokens, for the metrics only.
    losses, gate_logits = jax.lax.stop_gradient((losses, output.gate_logits))
    _, exits = stage1(losses, gate_logits, beta=0.0, mask=batch.loss_mask, count=totals.tokens)
    return loss, ObjectiveMetrics(exits, metrics)


def _noisy_rollouts(
    model: LoopLM,
    config: LoopRPTConfig,
    loops: int,
    variables: Variables,
    microbatch: ScoredBatch,
    totals: Totals,
) -> NoisyRollouts:
    """Returns the rollouts of the student on a microbatch.

    The backward pass computes each rollout again, so the states of one rollout exist at a time.
    """
    assert totals.key is not None
    batch, step_key = microbatch.batch, from_raw(totals.key)
    head = head_weights(model, variables)

    def rollout(_: None, number: Int[Array, ""]) -> tuple[None, NoisyRollouts]:
        noise_key, exit_key = jax.random.split(jax.random.fold_in(step_key, number))
        output = apply(
            model,
            variables,
            batch,
            loops,
            state_noise=config.noise,
            token_numbers=microbatch.numbers,
            rngs={"noise": noise_key},
        )
        return None, NoisyRollouts(
            log_probs=-token_losses(output.hidden, head, batch.targets, chunk=model.compute.loss_chunk),
            gate_logits=output.gate_logits,
            exit_loops=_sampled_exits(exit_key, microbatch.numbers, output.gate_logits),
        )

    # Inside a scan, XLA cannot merge the recomputation with the original, so it needs no barrier.
    once_more = jax.checkpoint(rollout, prevent_cse=False)
    _, rollouts = jax.lax.scan(once_more, None, jnp.arange(config.rollouts, dtype=jnp.int32))
    return rollouts


def _sampled_exits(
    key: PRNGKeyArray, numbers: Int[Array, "B S"], gate_logits: Float[Array, "T B S"]
) -> Int[Array, "B S"]:
    """Returns an exit loop for each token, in 1..T, drawn from its exit distribution.

    Of a uniform draw u, it is the first loop whose cumulative exit probability reaches u.
    """
    draws = jax.vmap(jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number))))(numbers)
    stays = log_survival(gate_logits[:-1]) > jnp.log1p(-draws)[None]
    return 1 + jnp.sum(stays, axis=0, dtype=jnp.int32)
