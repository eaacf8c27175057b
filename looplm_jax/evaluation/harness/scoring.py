"""Log-likelihoods of windows from one forward pass: at every loop, or at the loop that each token leaves at."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from looplm_jax.evaluation.harness.windows import Window, window_batches
from looplm_jax.halting import ExitPolicy, exit_loops
from looplm_jax.losses import token_scores
from looplm_jax.losses.cross_entropy import TokenScores
from looplm_jax.models.looplm import LoopLM, LoopLMOutput, Params, head_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of the scored tokens of one window; an entry for each loop, or a single one under an exit policy."""

    log_prob: tuple[float, ...]  # their sum, nats
    greedy: tuple[bool, ...]  # whether each is the likeliest token
    loops: tuple[int, ...]  # that they took together

    @classmethod
    def of_nothing(cls, readouts: int) -> "Likelihood":
        """That of no tokens."""
        return cls(log_prob=(0.0,) * readouts, greedy=(True,) * readouts, loops=(0,) * readouts)


@flax.struct.dataclass
class WindowScores:
    """Scores of the tokens that are read, and the loops they were read at; R is the number of loops, or one."""

    scores: TokenScores
    loops: Int[Array, "R B P"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowScorer:
    """Scores any number of windows. Neither their order nor `rows` shows in the results."""

    model: LoopLM
    params: Params
    loops: int  # that every token runs
    policy: ExitPolicy | None  # None: results for every loop
    rows: int  # windows in a batch
    longest: int  # tokens that the model reads
    on_windows: Callable[[int], None] | None = None  # called with the number of windows of each batch

    def __call__(self, windows: Sequence[Window]) -> list[Likelihood]:
        """The likelihood of each, summed in float64."""
        results = [Likelihood.of_nothing(self.loops if self.policy is None else 1)] * len(windows)
        for batch in window_batches(windows, rows=self.rows, longest=self.longest):
            arrays = batch.tokens, batch.read_positions, batch.targets
            found = score_windows(self.model, self.params, *arrays, loops=self.loops, policy=self.policy)
            found = jax.device_get(found)
            for row, index in enumerate(batch.indices):
                results[index] = _likelihood(found, row, windows[index].scored)
            if self.on_windows is not None:
                self.on_windows(len(batch.indices))
        return results


@functools.partial(jax.jit, static_argnames=("model", "loops", "policy"))
def score_windows(
    model: LoopLM,
    params: Params,
    tokens: Int[Array, "B S"],
    read_positions: Int[Array, "B P"],
    targets: Int[Array, "B P"],
    *,
    loops: int,
    policy: ExitPolicy | None,
) -> WindowScores:
    """Scores at every loop, or at those of a policy. The head reads nothing but the positions that are asked for.

    All tokens run all loops, as those of a prompt do; a policy says at which of them a prediction is read.
    """
    output = model.apply({"params": params}, tokens, loops=loops)
    assert isinstance(output, LoopLMOutput)
    hidden = jnp.take_along_axis(output.hidden, read_positions[None, :, :, None], axis=2)
    head = head_matrix(params, model.config)
    if policy is None:
        depths = jnp.arange(1, loops + 1, dtype=jnp.int32)[:, None, None]
        exits = jnp.broadcast_to(depths, hidden.shape[:3])
    else:
        gate_logits = jnp.take_along_axis(output.gate_logits, read_positions[None], axis=2)
        exits = _exit_loops(policy, hidden, gate_logits, head)[None]
        hidden = jnp.take_along_axis(hidden, exits[..., None] - 1, axis=0)
    return WindowScores(scores=token_scores(hidden, head, targets, chunk=model.compute.loss_chunk), loops=exits)


def _exit_loops(
    policy: ExitPolicy,
    hidden: Float[Array, "T B P D"],
    gate_logits: Float[Array, "T B P"],
    head: Float[Array, "D V"],
) -> Int[Array, "B P"]:
    """One row after another, so that a policy that reads predictions holds those of one row."""

    def predict(states: Float[Array, "P D"]) -> Float[Array, "P V"]:
        return jnp.einsum("pd,dv->pv", states, head.astype(states.dtype), preferred_element_type=jnp.float32)

    by_row = jnp.swapaxes(hidden, 0, 1), jnp.swapaxes(gate_logits, 0, 1)
    return jax.lax.map(lambda row: exit_loops(policy, row[0], row[1], predict), by_row)


def _likelihood(found: WindowScores, row: int, scored: int) -> Likelihood:
    loss, correct, loops = (
        np.asarray(values)[:, row, :scored] for values in (found.scores.loss, found.scores.correct, found.loops)
    )
    return Likelihood(
        log_prob=tuple(-float(total) for total in loss.sum(axis=1, dtype=np.float64)),
        greedy=tuple(bool(np.all(same)) for same in correct),
        loops=tuple(int(total) for total in loops.sum(axis=1)),
    )
