"""The exit rules of Huginn's published code, on the outputs of its tiny golden model and in the engine.

`huginn_exits.npz` holds, of the published code (seal-rg/recurrent-pretraining, commit 59e0b69b) on the model of
`huginn_golden`: `exit/<criterion>`, the value after each of 8 loops at every position; and, of greedy decoding with a
criterion at most 8 loops deep, `adaptive/<criterion>/latest-m4/` with `ids`, `steps`, the loops of each new token
(the first one ran all loops with the prompt), and `threshold`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huginn_golden import CONFIG, huginn_arrays, huginn_params

from looplm_jax.halting import (
    ArgmaxStable,
    CosineChange,
    EntropyChange,
    KLDivergence,
    MinPDivergence,
    RelativeStateDifference,
    exit_loops,
)
from looplm_jax.inference import Engine, EngineConfig, replay
from looplm_jax.models._blocks import make_context
from looplm_jax.models._looplm import LoopLM, head_matrix

_FILE = pathlib.Path(__file__).parent.parent / "data" / "huginn_exits.npz"
MODEL = LoopLM(CONFIG)
TWICE = ArgmaxStable(times=2)
DIFFERENT = 3  # the new token after the first whose exit by this rule is not the published one
RULES = {
    "latent-diff": RelativeStateDifference,
    "cosine": CosineChange,
    "kl": functools.partial(KLDivergence, reverse=True, from_uniform=True),
    "minp-kl": functools.partial(MinPDivergence, from_uniform=True),
    "entropy-diff": EntropyChange,
}


@functools.cache
def golden():
    with np.load(_FILE) as arrays:
        return dict(arrays)


def thresholds(values):
    """Returns three thresholds in the middle of wide gaps between the values, so that rounding decides nothing."""
    # Smaller values are rounding errors of float32, at least in part.
    ordered = np.sort(values[values > 1e-4])
    gaps = np.diff(np.log(ordered))
    found = []
    for share in (0.3, 0.6, 0.85):
        near = int(share * gaps.size)
        widest = near - 5 + int(np.argmax(gaps[near - 5 : near + 5]))
        found.append(float(np.sqrt(ordered[widest] * ordered[widest + 1])))
    return found


def exits_of(policy):
    arrays = huginn_arrays()
    hidden, states = jnp.asarray(arrays["hidden"]), jnp.asarray(arrays["states"][1:])
    gates = jnp.zeros(hidden.shape[:-1])
    return np.asarray(exit_loops(policy, hidden, gates, jnp.asarray(arrays["logits"]), states=states))


def first(leaves):
    leaves[-1] = True
    return np.argmax(leaves, axis=0) + 1


@pytest.mark.parametrize("criterion", RULES)
def test_exits_of_every_position_are_the_published_ones(criterion):
    values = golden()[f"exit/{criterion}"]
    at_loop_1 = criterion in ("kl", "minp-kl")
    for threshold in thresholds(values if at_loop_1 else values[1:]):
        expected = values < threshold
        if not at_loop_1:
            # A state is compared with the initial one there, which the golden file has and an engine has not.
            expected[0] = False
        np.testing.assert_array_equal(exits_of(RULES[criterion](threshold=threshold)), first(expected))
    assert not at_loop_1 or (first(expected) == 1).any()


def test_a_prediction_is_unchanged_as_often_as_published():
    values = golden()["exit/argmax-stability"]
    for times in (1, 2, 4):
        np.testing.assert_array_equal(exits_of(ArgmaxStable(times=times)), first(values >= times))


@pytest.mark.slow
def test_the_engine_exits_where_the_published_generator_does():
    criteria = [*RULES, "argmax-stability"]
    found = {name: {key: golden()[f"adaptive/{name}/latest-m4/{key}"] for key in ("ids", "steps")} for name in criteria}
    number = {name: float(golden()[f"adaptive/{name}/latest-m4/threshold"]) for name in criteria}
    policies = {name: rule(threshold=number[name]) for name, rule in RULES.items()} | {"argmax-stability": TWICE}

    prompt = [int(token) for token in huginn_arrays()["tokens"][0, :5]]
    params = huginn_params()
    engine = Engine(MODEL, params, config=EngineConfig(slots=len(criteria), capacity=16))
    # All at once, so that the programs with all kinds of policies are compiled once.
    handles = {
        name: engine.submit(engine.requests([prompt], max_new_tokens=6, policy=policy)[0])
        for name, policy in policies.items()
    }
    while not all(handle.done for handle in handles.values()):
        engine.step()

    for name, handle in handles.items():
        result = handle.result()
        assert list(result.tokens) == list(found[name]["ids"][5:]), name
        steps = list(found[name]["steps"][1:])
        if name == "argmax-stability":
            # The coda of one token reads other keys here, as the next test shows.
            assert steps[DIFFERENT] == 5
            steps[DIFFERENT] = 4
        assert list(result.exit_loops[1:]) == steps, name

    # A replay follows the exits, whatever the policy that decided them.
    result = handles["latent-diff"].result()
    np.testing.assert_allclose(replay(MODEL, params, result), result.log_probs, atol=1e-4)


def test_the_arg_max_is_stable_where_published_if_the_coda_keeps_one_loop_of_each_token():
    """The published cache has one plane for the coda, that of the exit; ours has one for each loop of a full cache."""
    ids = golden()["adaptive/argmax-stability/latest-m4/ids"][:-1]
    steps = golden()["adaptive/argmax-stability/latest-m4/steps"]
    exits = np.array([8] * 5 + list(steps[1:]))
    chosen = np.arange(5, 10)
    params = huginn_params()

    @jax.jit
    def predictions(tokens):
        states = MODEL.apply({"params": params}, tokens, return_state=True).state[:, 0]  # [T, S, D]
        # [T * N, S, D]: the state of one chosen token at one loop, after those of the exits of the tokens before it.
        at_exit = states[exits - 1, jnp.arange(10)]
        rows = jnp.broadcast_to(at_exit, (8, 5, *at_exit.shape)).at[:, jnp.arange(5), chosen].set(states[:, chosen])
        rows = rows.reshape(40, 10, CONFIG.width)
        positions = jnp.broadcast_to(jnp.arange(10), (40, 10))
        context = make_context(CONFIG, positions, jnp.ones_like(positions))
        hidden, _ = MODEL.apply({"params": params}, rows, context, method="read_out")
        hidden = hidden.reshape(8, 5, 10, CONFIG.width)[:, jnp.arange(5), chosen]
        return jnp.argmax(hidden @ head_matrix(params, CONFIG), axis=-1)  # [T, N]

    best = predictions(jnp.asarray(ids[None]))
    unchanged = np.zeros_like(best)
    for loop in range(1, 8):
        unchanged[loop] = np.where(best[loop] == best[loop - 1], unchanged[loop - 1] + 1, 0)
    np.testing.assert_array_equal(first(unchanged >= 2), steps[1:])


def test_a_model_call_returns_the_states_that_these_rules_read():
    tokens = jnp.asarray(huginn_arrays()["tokens"])
    output = jax.jit(functools.partial(MODEL.apply, loops=4, return_state=True))({"params": huginn_params()}, tokens)
    assert output.state.shape == output.hidden.shape
    # The norm is applied where the states are read, so they have other sizes than what the head reads.
    assert not np.allclose(output.state, output.hidden, atol=0.1)
