"""Random trajectories of a few tokens over loops, and their exits from the definitions, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from looplm_jax.halting import (
    ArgmaxStable,
    Confidence,
    CosineChange,
    EntropyChange,
    FixedLoops,
    HiddenDifference,
    KLDivergence,
    Margin,
    MinPDivergence,
    QExit,
    RelativeHiddenDifference,
    RelativeStateDifference,
    exit_loops,
)
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.halting.signals import LoopMemory

LOOPS, ROWS, WIDTH, VOCABULARY = 5, 4, 3, 6
KINDS = (
    FixedLoops,
    QExit,
    HiddenDifference,
    RelativeHiddenDifference,
    RelativeStateDifference,
    CosineChange,
    KLDivergence,
    MinPDivergence,
    EntropyChange,
    ArgmaxStable,
    Confidence,
    Margin,
)
jitted_exit_loops = jax.jit(exit_loops)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """States `[T, B, D]`, gates `[T, B]` and logits `[T, B, V]`; each row converges at its own rate."""

    hidden: np.ndarray
    gates: np.ndarray
    logits: np.ndarray
    states: np.ndarray

    def exits(self, table):
        return np.asarray(jitted_exit_loops(table, self.hidden, self.gates, self.logits, states=self.states))


@st.composite
def trajectories(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rate = random.choice([0.0, 0.05, 0.3, 0.8, 1.0], (ROWS, 1))
    size = random.choice([0.1, 1.0, 5.0], (ROWS, 1))

    def converging(width):
        end = size * random.normal(size=(ROWS, width))
        noise = size * random.normal(size=(LOOPS, ROWS, width))
        return (end + noise * rate ** np.arange(LOOPS)[:, None, None]).astype(np.float32)

    gates = random.choice([-80.0, 80.0, -3.0, -1.0, 0.0, 1.0], (LOOPS, ROWS)).astype(np.float32)
    return Trajectory(hidden=converging(WIDTH), gates=gates, logits=converging(VOCABULARY), states=converging(WIDTH))


def exits_step_by_step(policy, trajectory):
    """Returns exit loops by calling the policy loop after loop, without compiling the whole."""
    shapes = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (trajectory.hidden, trajectory.logits))
    memory = LoopMemory.before_loops(policy.needs, *shapes)
    leaves = []
    for state, gate, logits, before in zip(trajectory.hidden, trajectory.gates, trajectory.logits, trajectory.states):
        given = (jnp.asarray(signal) for signal in (gate, state, logits))
        signals = memory.observe(*given, state=jnp.asarray(before))
        leaves.append(np.asarray(policy.exits(signals)))
        memory = signals.memory()
    leaves[-1] = np.ones(ROWS, bool)
    return np.argmax(leaves, axis=0) + 1


small = st.sampled_from([1e-5, 1e-3, 0.03, 0.2, 0.7, 3.0])
fraction = st.floats(0, 1, width=32)
policies = st.one_of(
    st.integers(1, LOOPS + 1).map(lambda loops: FixedLoops(loops=loops)),
    fraction.map(lambda q: QExit(q=q)),
    *(
        small.map(lambda threshold, kind=kind: kind(threshold=threshold))
        for kind in (
            HiddenDifference,
            RelativeHiddenDifference,
            RelativeStateDifference,
            CosineChange,
            MinPDivergence,
            EntropyChange,
        )
    ),
    st.builds(KLDivergence, threshold=small, reverse=st.booleans(), from_uniform=st.booleans()),
    st.integers(1, LOOPS).map(lambda times: ArgmaxStable(times=times)),
    fraction.map(lambda probability: Confidence(probability=probability)),
    fraction.map(lambda margin: Margin(margin=margin)),
)


@functools.cache
def no_slots():
    return PolicyTable.empty(0, KINDS)


def row(policy):
    """Returns the policy with traced numbers, so that one program serves all tests."""
    return no_slots().row(policy)


def evidence(trajectory, policy):
    """Returns the value that the policy compares with its number at each loop, `[T, B]`, in float64."""
    hidden, logits, states = (x.astype(np.float64) for x in (trajectory.hidden, trajectory.logits, trajectory.states))
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    p = np.exp(log_p)
    match policy:
        case HiddenDifference():
            return _since_before(np.linalg.norm(np.diff(hidden, axis=0), axis=-1))
        case RelativeHiddenDifference():
            return _since_before(np.linalg.norm(np.diff(hidden, axis=0), axis=-1) / np.linalg.norm(hidden[1:], axis=-1))
        case RelativeStateDifference():
            return _since_before(np.linalg.norm(np.diff(states, axis=0), axis=-1) / np.linalg.norm(states[1:], axis=-1))
        case CosineChange():
            lengths = np.linalg.norm(states, axis=-1)
            return _since_before(1 - np.sum(states[1:] * states[:-1], axis=-1) / (lengths[1:] * lengths[:-1]))
        case KLDivergence():
            return _since_before(np.sum(p[1:] * np.diff(log_p, axis=0), axis=-1))
        case MinPDivergence():
            q = np.where(p < 0.1 * p.max(axis=-1, keepdims=True), 1 / VOCABULARY, p)
            q = q / q.sum(axis=-1, keepdims=True)
            return _since_before(np.sum(q[:-1] * -np.diff(np.log(q), axis=0), axis=-1))
        case EntropyChange():
            return _since_before(np.abs(np.diff(-np.sum(p * log_p, axis=-1), axis=0)))
        case Confidence():
            return p.max(axis=-1)
        case Margin():
            return np.diff(np.sort(p, axis=-1)[..., -2:], axis=-1)[..., 0]


def _since_before(changes):
    return np.concatenate([np.full((1, ROWS), np.inf), changes])
