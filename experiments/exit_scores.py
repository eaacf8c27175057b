"""Families of exit policies, from the fewest to the most loops, scored on the same sequences from one forward pass."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from looplm_jax.data.packing import Batch
from looplm_jax.evaluation.curves import Curve
from looplm_jax.halting import (
    ArgmaxStable,
    Confidence,
    EntropyChange,
    ExitPolicy,
    FixedLoops,
    HiddenDifference,
    KLDivergence,
    Margin,
    PolicyTable,
    QExit,
    RelativeHiddenDifference,
    exit_loops,
)
from looplm_jax.inference.tick import logits_of
from looplm_jax.losses import token_scores
from looplm_jax.models.looplm import LoopLM, Params, head_matrix

# Probabilities, closer together towards 0 and 1, where gates and predictions are sure; and thresholds of any unit.
_PROBABILITIES = (0.0, *(1 / (1 + np.exp(-np.linspace(-12, 12, 49)))).tolist(), 1.0)
_CHANGES = tuple(np.geomspace(1e-6, 1e3, 73).tolist())

FIXED, GATE = "fixed depth", "Q-exit"


def families(loops: int) -> dict[str, tuple[ExitPolicy, ...]]:
    """Every policy of `looplm_jax.halting` by name, each with its one number over all of its range."""
    return {
        FIXED: tuple(FixedLoops(loops=count) for count in range(1, loops + 1)),
        GATE: tuple(QExit(q=q) for q in _PROBABILITIES),
        "state difference": tuple(HiddenDifference(threshold=x) for x in reversed(_CHANGES)),
        "relative state difference": tuple(RelativeHiddenDifference(threshold=x) for x in reversed(_CHANGES)),
        "KL of predictions": tuple(KLDivergence(threshold=x) for x in reversed(_CHANGES)),
        "entropy change": tuple(EntropyChange(threshold=x) for x in reversed(_CHANGES)),
        "arg-max stable": tuple(ArgmaxStable(times=times) for times in range(1, loops)),
        "confidence": tuple(Confidence(probability=p) for p in _PROBABILITIES),
        "margin": tuple(Margin(margin=p) for p in _PROBABILITIES),
    }


@flax.struct.dataclass
class RowSums:
    """Of a family of M policies on N rows: sums over the tokens of each row that count."""

    loss: Float[Array, "M N"]
    correct: Float[Array, "M N"]
    loops: Float[Array, "M N"]
    tokens: Float[Array, "N"]

    def resampled(self, drawn: Int[np.ndarray, "R N"]) -> "Frontier":
        """Means over the tokens of each resample of the rows."""
        tokens = drawn @ np.asarray(self.tokens)

        def mean(sums: Float[Array, "M N"]) -> Float[np.ndarray, "R M"]:
            return (drawn @ np.asarray(sums).T) / tokens[:, None]

        return Frontier(loops=mean(self.loops), loss=mean(self.loss), accuracy=mean(self.correct))


@flax.struct.dataclass
class Frontier:
    """Points of rising mean loops, for each of R resamples."""

    loops: Float[np.ndarray, "R M"]
    loss: Float[np.ndarray, "R M"]
    accuracy: Float[np.ndarray, "R M"]

    def joined(self, fixed: "Frontier") -> "Frontier":
        """With one loop for all tokens before it and T loops behind it.

        What lies between two points is what drawing lots between the two policies gives, so that all families have a
        curve over the whole span, those too that never leave at loop 1.
        """
        ends = zip(jax.tree.leaves(self), jax.tree.leaves(fixed), strict=True)
        values = [np.concatenate([whole[:, :1], own, whole[:, -1:]], axis=1) for own, whole in ends]
        return jax.tree.unflatten(jax.tree.structure(self), values)

    def area(self, values: Float[np.ndarray, "R M"]) -> Float[np.ndarray, "R"]:
        """The mean of `values` over all budgets from 1 to T (trapezia)."""
        return np.trapezoid(values, self.loops, axis=1) / (self.loops[:, -1] - self.loops[:, 0])

    def at(self, budgets: ArrayLike) -> Curve:
        """Of the first resample, at budgets of mean loops."""
        wanted = np.asarray(budgets, float)
        loss, accuracy = (np.interp(wanted, self.loops[0], values[0]) for values in (self.loss, self.accuracy))
        return Curve.of(wanted, loss, accuracy)


def score_families(
    model: LoopLM, params: Params, batches: Iterable[Batch], wanted: Mapping[str, Sequence[ExitPolicy]]
) -> dict[str, RowSums]:
    """All families on all rows of the batches that have a token to count."""
    tables = {name: _table(policies) for name, policies in wanted.items()}
    found = []
    for batch in batches:
        arrays = batch.tokens, batch.targets, batch.positions, batch.segment_ids, batch.loss_mask
        sums = jax.device_get(_score(model, params, *arrays, tables))
        counted = batch.loss_mask.sum(axis=1) > 0
        found.append(jax.tree.map(lambda x, counted=counted: x[..., counted].astype(np.float64), sums))
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *found)


def _table(policies: Sequence[ExitPolicy]) -> PolicyTable:
    """Policies of one kind, one behind the other."""
    room = PolicyTable.empty(1, kinds=(type(policies[0]),))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(room.row(policy) for policy in policies))


@functools.partial(jax.jit, static_argnames=("model",))
def _score(
    model: LoopLM,
    params: Params,
    tokens: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    mask: Float[Array, "B S"],
    tables: dict[str, PolicyTable],
) -> dict[str, RowSums]:
    output: Any = model.apply({"params": params}, tokens, positions=positions, segment_ids=segment_ids)
    scored = token_scores(output.hidden, head_matrix(params, model.config), targets, chunk=model.compute.loss_chunk)
    logits = logits_of(model, params, output.hidden)

    def sums(policy: PolicyTable) -> tuple[Array, ...]:
        exits = exit_loops(policy, output.hidden, output.gate_logits, logits)

        def at_exit(values: Float[Array, "T B S"]) -> Float[Array, "B"]:
            chosen = jnp.take_along_axis(values, exits[None] - 1, axis=0)[0]
            return jnp.sum(chosen.astype(jnp.float32) * mask, axis=-1)

        return at_exit(scored.loss), at_exit(scored.correct), jnp.sum(exits.astype(jnp.float32) * mask, axis=-1)

    def of_family(table: PolicyTable) -> RowSums:
        loss, correct, loops = jax.vmap(sums)(table)
        return RowSums(loss=loss, correct=correct, loops=loops, tokens=jnp.sum(mask, axis=-1))

    return {name: of_family(table) for name, table in tables.items()}
