"""Families of exit policies, from the fewest to the most loops, scored on the same sequences in one forward pass."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from looplm_jax.data import Batch
from looplm_jax.evaluation import Curve
from looplm_jax.halting import (
    ArgmaxStable,
    Confidence,
    EntropyChange,
    ExitPolicy,
    FixedLoops,
    HiddenDifference,
    KLDivergence,
    Margin,
    QExit,
    RelativeHiddenDifference,
    exit_loops,
)
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.inference._tick import logits_of
from looplm_jax.losses import token_scores
from looplm_jax.models import LoopLM, Params, head_matrix

# Probabilities, denser near 0 and 1, where confident gates and predictions are; and thresholds that suit any unit.
_PROBABILITIES = (0.0, *(1 / (1 + np.exp(-np.linspace(-12, 12, 49)))).tolist(), 1.0)
_CHANGES = tuple(np.geomspace(1e-6, 1e3, 73).tolist())

FIXED, GATE = "fixed depth", "Q-exit"


def families(loops: int) -> dict[str, tuple[ExitPolicy, ...]]:
    """Returns every policy of `looplm_jax.halting` by name, with its parameter swept over its whole range."""
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
    """Sums over the unmasked tokens of each of N rows, for a family of M policies."""

    loss: Float[Array, "M N"]
    correct: Float[Array, "M N"]
    loops: Float[Array, "M N"]
    tokens: Float[Array, "N"]

    def resampled(self, drawn: Int[np.ndarray, "R N"]) -> "Frontier":
        """Returns means over the tokens of each resample of the rows."""
        # [R]: tokens in each resample.
        tokens = drawn @ np.asarray(self.tokens)

        def mean(sums: Float[Array, "M N"]) -> Float[np.ndarray, "R M"]:
            return (drawn @ np.asarray(sums).T) / tokens[:, None]

        return Frontier(loops=mean(self.loops), loss=mean(self.loss), accuracy=mean(self.correct))


@flax.struct.dataclass
class Frontier:
    """Points in the order of rising mean loops, for each of R resamples."""

    loops: Float[np.ndarray, "R M"]
    loss: Float[np.ndarray, "R M"]
    accuracy: Float[np.ndarray, "R M"]

    def joined(self, fixed: "Frontier") -> "Frontier":
        """Returns the frontier between the point of one loop and the point of T loops for all tokens.

        The line between two points corresponds to choosing at random between their policies. So every family has a
        curve over the whole span, including families that never exit at loop 1.
        """
        ends = zip(jax.tree.leaves(self), jax.tree.leaves(fixed), strict=True)
        values = [np.concatenate([whole[:, :1], own, whole[:, -1:]], axis=1) for own, whole in ends]
        return jax.tree.unflatten(jax.tree.structure(self), values)

    def area(self, values: Float[np.ndarray, "R M"]) -> Float[np.ndarray, "R"]:
        """Returns the mean of `values` over all budgets from 1 to T (trapezoidal rule)."""
        return np.trapezoid(values, self.loops, axis=1) / (self.loops[:, -1] - self.loops[:, 0])

    def at(self, budgets: ArrayLike) -> Curve:
        """Returns the curve of the first resample at budgets of mean loops."""
        wanted = np.asarray(budgets, float)
        loss, accuracy = (np.interp(wanted, self.loops[0], values[0]) for values in (self.loss, self.accuracy))
        return Curve.of(wanted, loss, accuracy)


# Scoring


def score_families(
    model: LoopLM, params: Params, batches: Iterable[Batch], wanted: Mapping[str, Sequence[ExitPolicy]]
) -> dict[str, RowSums]:
    """Scores all families on all rows of the batches that have an unmasked token."""
    tables = {name: _table(policies) for name, policies in wanted.items()}
    found = []

    for batch in batches:
        sums = jax.device_get(_score(model, params, batch, tables))
        # Rows that pad the last batch would be drawn by the bootstrap.
        counted = batch.loss_mask.sum(axis=1) > 0
        found.append(jax.tree.map(lambda x, counted=counted: x[..., counted].astype(np.float64), sums))

    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *found)


def _table(policies: Sequence[ExitPolicy]) -> PolicyTable:
    """Stacks policies of one kind into a table, one policy per entry of the leading axis."""
    # A table of one kind evaluates only the signals that this kind needs.
    room = PolicyTable.empty(1, kinds=(type(policies[0]),))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(room.row(policy) for policy in policies))


@functools.partial(jax.jit, static_argnames=("model",))
def _score(
    model: LoopLM,
    params: Params,
    batch: Batch,
    tables: dict[str, PolicyTable],
) -> dict[str, RowSums]:
    """Returns the sums of all families on one batch."""
    output: Any = model.apply(
        {"params": params}, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    head, mask = head_matrix(params, model.config), batch.loss_mask
    scored = token_scores(output.hidden, head, batch.targets, chunk=model.compute.loss_chunk)
    logits = logits_of(model, params, output.hidden)

    def sums(policy: PolicyTable) -> tuple[Array, ...]:
        exits = exit_loops(policy, output.hidden, output.gate_logits, logits)

        def at_exit(values: Float[Array, "T B S"]) -> Float[Array, "B"]:
            chosen = jnp.take_along_axis(values, exits[None] - 1, axis=0)[0]
            return jnp.sum(chosen.astype(jnp.float32) * mask, axis=-1)

        return at_exit(scored.loss), at_exit(scored.correct), jnp.sum(exits.astype(jnp.float32) * mask, axis=-1)

    def of_family(table: PolicyTable) -> RowSums:
        # One forward pass; only the choice of the exits is repeated for each policy.
        loss, correct, loops = jax.vmap(sums)(table)
        return RowSums(loss=loss, correct=correct, loops=loops, tokens=jnp.sum(mask, axis=-1))

    return {name: of_family(table) for name, table in tables.items()}
