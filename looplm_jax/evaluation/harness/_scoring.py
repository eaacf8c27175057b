"""Log-likelihoods of windows of tokens from one forward pass: at every loop, or at the loop where each token exits."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy, exit_loops
from looplm_jax.halting.signals import Needs
from looplm_jax.inference._kv_cache import bucket
from looplm_jax.inference._request_checks import check_gate
from looplm_jax.losses import token_scores
from looplm_jax.losses._cross_entropy import TokenScores
from looplm_jax.models._looplm import LoopLM, LoopLMOutput, Params, head_matrix

# Windows: requests as sequences of tokens, in batches of few shapes


@dataclasses.dataclass(frozen=True)
class Window:
    """A sequence of tokens. The last `scored` ones are predicted, each from all tokens before it."""

    tokens: tuple[int, ...]
    scored: int

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], longest: int) -> "Window":
        """Returns the continuation after as much of the context's end as a model that reads `longest` tokens can see.

        Raises:
          UserError: the continuation alone is longer.
        """
        if len(continuation) > longest:
            raise UserError(
                f"a continuation of {len(continuation)} tokens does not fit the {longest} that the model reads; "
                "give a larger max_length, or leave the task out"
            )
        # The last token is only predicted, never read, so a window holds one more than the model reads.
        return cls(tokens=(*context, *continuation)[-(longest + 1) :], scored=len(continuation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowBatch:
    """Windows in one array, padded on the right. A causal model does not see the padding."""

    indices: tuple[int, ...]  # indices of the windows, one per row that is not padding
    tokens: Int[np.ndarray, "B S"]
    read_positions: Int[np.ndarray, "B P"]  # the positions at which scored tokens are predicted
    targets: Int[np.ndarray, "B P"]


def window_batches(windows: Sequence[Window], *, rows: int, longest: int) -> Iterator[WindowBatch]:
    """Yields batches of `rows` windows whose lengths fall into the same buckets, longest first.

    There are as many shapes, and therefore compiled programs, as pairs of buckets. Windows without a scored token are
    left out.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, window in enumerate(windows):
        # [length of the inputs, number of scored tokens], both rounded up -> indices of windows
        if window.scored:
            alike[bucket(len(window.tokens) - 1, longest), bucket(window.scored, longest)].append(index)

    for (length, scored), indices in sorted(alike.items(), reverse=True):
        for start in range(0, len(indices), rows):
            yield _batch(windows, indices[start : start + rows], (rows, length), (rows, scored))


def _batch(
    windows: Sequence[Window], indices: Sequence[int], shape: tuple[int, int], scored_shape: tuple[int, int]
) -> WindowBatch:
    """Returns one batch, padded to the given shapes."""
    tokens = np.zeros(shape, np.int32)
    read_positions, targets = np.zeros((2, *scored_shape), np.int32)

    for row, index in enumerate(indices):
        *inputs, _ = window = windows[index].tokens
        scored = windows[index].scored
        tokens[row, : len(inputs)] = inputs
        # The token at position p + 1 is predicted at position p.
        read_positions[row, :scored] = np.arange(len(inputs) - scored, len(inputs))
        targets[row, :scored] = window[-scored:]
    return WindowBatch(indices=tuple(indices), tokens=tokens, read_positions=read_positions, targets=targets)


# Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The scored tokens of one window, with one entry per loop, or a single entry under an exit policy."""

    log_prob: tuple[float, ...]  # sum of the log-probabilities, nats
    greedy: tuple[bool, ...]  # whether every token is the most probable one
    loops: tuple[int, ...]  # total loops of the tokens

    @classmethod
    def of_nothing(cls, readouts: int) -> "Likelihood":
        """Returns the likelihood of no tokens."""
        return cls(log_prob=(0.0,) * readouts, greedy=(True,) * readouts, loops=(0,) * readouts)


@flax.struct.dataclass
class WindowScores:
    """Scores of the tokens that are read, and the loops they were read at; R is the number of loops, or one."""

    scores: TokenScores
    loops: Int[Array, "R B P"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowScorer:
    """Scores any number of windows. Neither their order nor `rows` affects the results.

    Raises:
      UserError: the policy reads the gate of a model without one.
    """

    model: LoopLM
    params: Params
    loops: int  # the loops that every token runs
    policy: ExitPolicy | None  # None: results for every loop
    rows: int  # windows per batch
    longest: int  # number of tokens that the model reads
    on_windows: Callable[[int], None] | None = None  # called with the number of windows of each batch

    def __post_init__(self) -> None:
        check_gate(self.policy, self.model.config)

    def __call__(self, windows: Sequence[Window]) -> list[Likelihood]:
        """Returns the likelihood of each window, summed in float64."""
        # Windows without a scored token are in no batch, and keep this entry.
        results = [Likelihood.of_nothing(self.loops if self.policy is None else 1)] * len(windows)
        for batch in window_batches(windows, rows=self.rows, longest=self.longest):
            arrays = batch.tokens, batch.read_positions, batch.targets
            scores = score_windows(self.model, self.params, *arrays, loops=self.loops, policy=self.policy)
            scores = jax.device_get(scores)
            for row, index in enumerate(batch.indices):
                results[index] = _likelihood(scores, row, windows[index].scored)
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
    """Returns scores at every loop, or at the loops of a policy. The head computes only the requested positions.

    All tokens run all loops, as the tokens of a prompt do; a policy decides at which loop a prediction is read.
    """
    reads_state = policy is not None and Needs.STATE in policy.needs
    output = model.apply({"params": params}, tokens, loops=loops, return_state=reads_state)
    assert isinstance(output, LoopLMOutput)
    # [T, B, S, D] -> [T, B, P, D]
    hidden, states = jax.tree.map(
        lambda of_loops: jnp.take_along_axis(of_loops, read_positions[None, :, :, None], axis=2),
        (output.hidden, output.state),
    )
    head = head_matrix(params, model.config)

    if policy is None:
        depths = jnp.arange(1, loops + 1, dtype=jnp.int32)[:, None, None]
        exits = jnp.broadcast_to(depths, hidden.shape[:3])
    else:
        gate_logits = jnp.take_along_axis(output.gate_logits, read_positions[None], axis=2)
        # [1, B, P]: one readout per token.
        exits = _exit_loops(policy, hidden, states, gate_logits, head)[None]
        # Loops count from 1.
        hidden = jnp.take_along_axis(hidden, exits[..., None] - 1, axis=0)

    return WindowScores(scores=token_scores(hidden, head, targets, chunk=model.compute.loss_chunk), loops=exits)


def _exit_loops(
    policy: ExitPolicy,
    hidden: Float[Array, "T B P D"],
    states: Float[Array, "T B P D"] | None,
    gate_logits: Float[Array, "T B P"],
    head: Float[Array, "D V"],
) -> Int[Array, "B P"]:
    """Returns the exit loop of each position.

    Sequences are processed one after another, so that a policy that reads predictions keeps only those of one sequence.
    """

    def predict(states: Float[Array, "P D"]) -> Float[Array, "P V"]:
        return jnp.einsum("pd,dv->pv", states, head.astype(states.dtype), preferred_element_type=jnp.float32)

    def of_row(row: tuple[Array, Array, Array | None]) -> Int[Array, "P"]:
        hidden, gate_logits, states = row
        return exit_loops(policy, hidden, gate_logits, predict, states=states)

    return jax.lax.map(of_row, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (hidden, gate_logits, states)))


def _likelihood(batch: WindowScores, row: int, scored: int) -> Likelihood:
    """Returns the likelihood of one window of a batch."""
    # Positions after the scored ones are padding.
    loss, correct, loops = (
        np.asarray(values)[:, row, :scored] for values in (batch.scores.loss, batch.scores.correct, batch.loops)
    )

    return Likelihood(
        log_prob=tuple(-float(total) for total in loss.sum(axis=1, dtype=np.float64)),
        greedy=tuple(bool(np.all(same)) for same in correct),
        loops=tuple(int(total) for total in loops.sum(axis=1)),
    )
