"""Accuracy at every loop on easy, medium and hard tokens, as a base model sees them (LoopRPT, arXiv 2603.19714)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from looplm_jax.data._packing import Batch
from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import PerDepth, score_exits
from looplm_jax.losses import token_entropies, token_scores
from looplm_jax.models._looplm import LoopLM, Params, head_matrix
from looplm_jax.sharding import to_host
from looplm_jax.terminal import Table

ENTROPY_BOUNDS = {"easy": (0.5, 1.0), "medium": (1.0, 1.5), "hard": (1.5, np.inf)}
"""The lower bound, exclusive, and the upper bound of the entropy of the tokens in each bucket, in nats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketScore:
    """The scores of the tokens in a bucket.

    Attributes:
      name: its name.
      tokens: the number of its tokens.
      accuracy: the accuracy at loops 1 to T; that of the last one is the peak.
      adaptive_accuracy: the accuracy at the loop that Q-exit chooses.
      mean_loops: the mean of that loop.
    """

    name: str
    tokens: int
    accuracy: tuple[float, ...]
    adaptive_accuracy: float
    mean_loops: float


@flax.struct.dataclass
class _Sums:
    """Sums over the tokens of each bucket, K buckets."""

    tokens: Float[Array, "K"]
    correct: Float[Array, "T K"]
    adaptive: Float[Array, "K"]
    loops: Float[Array, "K"]


def bucket_scores(
    model: LoopLM,
    params: Params,
    base_model: LoopLM,
    base_params: Params,
    batches: Iterable[Batch],
    *,
    q: float = 0.5,
    on_batch: Callable[[], None] | None = None,
) -> tuple[BucketScore, ...]:
    """Returns the scores of easy, medium and hard tokens, by the entropy of the base model's predictions at loop 1.

    Tokens with an entropy of at most 0.5 are in no bucket. A bucket without tokens has accuracies of NaN.

    Args:
      model: the model to score.
      params: its parameters.
      base_model: the model whose entropies divide the tokens, such as the one that training started from.
      base_params: its parameters.
      batches: batches with the tokens of both models.
      q: the threshold of Q-exit.
      on_batch: called after each batch.

    Raises:
      UserError: the models have different vocabularies, or there is no batch.
    """
    if model.config.vocab_size != base_model.config.vocab_size:
        raise UserError(
            f"the base model has {base_model.config.vocab_size} tokens, this one {model.config.vocab_size}; "
            "give the model that it was trained from"
        )

    total: Any = None
    for batch in batches:
        entropies = _first_loop_entropies(base_model, base_params, batch)
        # Sums in float64, so that they do not depend on the number of batches.
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), to_host(_sums(model, params, batch, entropies, q)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        if on_batch is not None:
            on_batch()
    if total is None:
        raise UserError("there is no held-out batch to score; give more data")

    # The means of a bucket without tokens are 0 / 0.
    with np.errstate(invalid="ignore"):
        accuracy, adaptive, loops = (x / total.tokens for x in (total.correct, total.adaptive, total.loops))
    return tuple(
        BucketScore(
            name=name,
            tokens=int(total.tokens[index]),
            accuracy=tuple(map(float, accuracy[:, index])),
            adaptive_accuracy=float(adaptive[index]),
            mean_loops=float(loops[index]),
        )
        for index, name in enumerate(ENTROPY_BOUNDS)
    )


def bucket_table(scores: Iterable[BucketScore], *, title: str = "held-out tokens by entropy of the base") -> Table:
    """Returns the table of LoopRPT: accuracy in % at every loop, at the loops of Q-exit, and the mean of these."""
    scores = tuple(scores)
    loops = range(1, len(scores[0].accuracy) + 1)

    def percent(share: float) -> str:
        return "-" if np.isnan(share) else f"{100 * share:.2f}"

    return Table(
        title=title,
        columns=["bucket", "tokens", *(f"loop {loop}" for loop in loops), "adaptive", "mean loops"],
        rows=[
            [
                own.name,
                f"{own.tokens:,}",
                *map(percent, own.accuracy),
                percent(own.adaptive_accuracy),
                "-" if np.isnan(own.mean_loops) else f"{own.mean_loops:.2f}",
            ]
            for own in scores
        ],
    )


@functools.partial(jax.jit, static_argnames=("model",))
def _first_loop_entropies(model: LoopLM, params: Params, batch: Batch) -> Float[Array, "B S"]:
    """Returns the entropy of every prediction after one loop, in nats."""
    output: Any = model.apply(
        {"params": params}, batch.tokens, loops=1, positions=batch.positions, segment_ids=batch.segment_ids
    )
    return token_entropies(output.hidden, head_matrix(params, model.config), chunk=model.compute.loss_chunk)[0]


@functools.partial(jax.jit, static_argnames=("model", "q"))
def _sums(model: LoopLM, params: Params, batch: Batch, entropies: Float[Array, "B S"], q: float) -> _Sums:
    """Returns the sums of a batch."""
    output: Any = model.apply(
        {"params": params}, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    scored = token_scores(
        output.hidden, head_matrix(params, model.config), batch.targets, chunk=model.compute.loss_chunk
    )
    exits = score_exits(
        PerDepth(loss=scored.loss, correct=scored.correct), output.gate_logits, jnp.array([q], jnp.float32)
    )

    bounds = jnp.array(list(ENTROPY_BOUNDS.values()), jnp.float32)
    # [K, B, S]: the tokens of each bucket.
    inside = (entropies[None] > bounds[:, :1, None]) & (entropies[None] <= bounds[:, 1:, None])
    # A masked token has the weight 0 in every bucket.
    weights = inside.astype(jnp.float32) * batch.loss_mask.astype(jnp.float32)[None]

    def per_bucket(values: Shaped[Array, "A B S"]) -> Float[Array, "A K"]:
        return jnp.einsum("abs,kbs->ak", values.astype(jnp.float32), weights)

    return _Sums(
        tokens=jnp.sum(weights, axis=(1, 2)),
        correct=per_bucket(scored.correct),
        adaptive=per_bucket(exits.correct)[0],
        loops=per_bucket(exits.loops)[0],
    )
