import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_cases import make_loaded
from harness_cases import forward, log_probs_of

from looplm_jax.config import GatePlacement, ModelConfig
from looplm_jax.errors import UserError
from looplm_jax.evaluation.harness._scoring import Likelihood, Window, WindowScorer, score_windows
from looplm_jax.halting import Bounded, Confidence, FixedLoops, QExit, RelativeStateDifference
from looplm_jax.models._looplm import LoopLM, init_params

LOOPS = 4
LONGEST = 64
SURE = 0.25
Q = 0.9


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


@pytest.fixture(scope="module")
def pairs(loaded):
    """Returns contexts and continuations of many lengths, including the most likely continuation."""
    generator = np.random.default_rng(1)
    vocab = loaded.model.config.vocab_size
    lengths = zip(generator.integers(1, 40, 14), generator.integers(1, 20, 14), strict=True)
    found = [(generator.integers(0, vocab, m).tolist(), generator.integers(0, vocab, n).tolist()) for m, n in lengths]
    context = found[0][0]
    log_probs, _ = forward(loaded, context, LOOPS)
    return [*found, (context, [int(log_probs[LOOPS - 1, -1].argmax())])]


def scorer(loaded, policy=None, rows=4):
    return WindowScorer(
        model=loaded.model, params=loaded.params, loops=LOOPS, policy=policy, rows=rows, longest=LONGEST
    )


def windows_of(pairs):
    return [Window.of(context, continuation, LONGEST) for context, continuation in pairs]


@pytest.fixture(scope="module")
def at_every_loop(loaded, pairs):
    return scorer(loaded)(windows_of(pairs))


def test_every_loop_is_the_plain_sum(loaded, pairs, at_every_loop):
    for (context, continuation), found in zip(pairs, at_every_loop, strict=True):
        log_probs, greedy = log_probs_of(loaded, context, continuation, LOOPS)
        np.testing.assert_allclose(found.log_prob, log_probs.sum(axis=1), rtol=1e-5, atol=1e-5)
        assert found.greedy == tuple(greedy.all(axis=1))
        assert found.loops == tuple(len(continuation) * loops for loops in range(1, LOOPS + 1))
    assert any(found.greedy[LOOPS - 1] for found in at_every_loop)


def test_a_fixed_depth_is_that_of_the_sweep(loaded, pairs, at_every_loop):
    found = scorer(loaded, FixedLoops(loops=3))(windows_of(pairs))
    np.testing.assert_allclose(
        [one.log_prob[0] for one in found], [one.log_prob[2] for one in at_every_loop], rtol=1e-5, atol=1e-5
    )
    assert [one.greedy for one in found] == [one.greedy[2:3] for one in at_every_loop]


def q_exits(log_probs, gates):
    cdf = 1 - np.cumprod(1 - gates, axis=0)
    return cdf >= Q


def confident(log_probs, gates):
    return (np.exp(log_probs.max(axis=-1)) >= SURE) & (np.arange(1, LOOPS + 1) >= 2)[:, None]


@pytest.mark.parametrize(
    ("policy", "leaves"),
    [(QExit(q=Q), q_exits), (Bounded(Confidence(probability=SURE), min_loops=2), confident)],
    ids=["gate", "predictions"],
)
def test_a_policy_reads_each_token_where_it_leaves(loaded, pairs, policy, leaves):
    found = scorer(loaded, policy)(windows_of(pairs))
    depths = set()
    for (context, continuation), one in zip(pairs, found, strict=True):
        log_probs, gates = forward(loaded, [*context, *continuation][:-1], LOOPS)
        left = leaves(log_probs, gates)[:, -len(continuation) :]
        left[-1] = True
        exits = left.argmax(axis=0)
        at_exit = log_probs[:, -len(continuation) :][exits, range(len(continuation))]
        expected = at_exit[range(len(continuation)), continuation].sum()
        assert one.log_prob[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert one.loops == (sum(exits + 1),)
        depths |= set(exits)
    assert len(depths) > 1


def test_neither_order_nor_batch_size_shows(loaded, pairs, at_every_loop):
    windows = windows_of(pairs)
    for rows, order in ((4, reversed(range(len(windows)))), (3, range(len(windows)))):
        places = list(order)
        found = scorer(loaded, rows=rows)([windows[place] for place in places])
        for place, one in zip(places, found, strict=True):
            np.testing.assert_allclose(one.log_prob, at_every_loop[place].log_prob, atol=1e-5, rtol=0)
            assert one.greedy == at_every_loop[place].greedy


def test_a_bucket_is_compiled_once(loaded, pairs, at_every_loop):
    before = score_windows._cache_size()
    scorer(loaded)(windows_of(pairs[::-1]))
    scorer(loaded)([Window.of([1], [2] * length, LONGEST) for length in range(1, LONGEST, 5)])
    assert score_windows._cache_size() == before


def test_nothing_to_score_is_certain(loaded):
    assert scorer(loaded)([Window.of([1, 2], [], LONGEST)]) == [Likelihood.of_nothing(LOOPS)]
    assert scorer(loaded)([]) == []


def tiny(**options):
    config = ModelConfig(vocab_size=13, width=8, mlp_width=8, num_layers=1, num_heads=2, loops=LOOPS, **options)
    return LoopLM(config)


def test_a_policy_that_reads_the_gate_of_a_model_without_one_is_refused():
    with pytest.raises(UserError) as error:
        WindowScorer(
            model=tiny(gate=GatePlacement.NONE), params={}, loops=LOOPS, policy=QExit(q=Q), rows=1, longest=LONGEST
        )
    assert str(error.value) == (
        "QExit reads the exit gate, and the model has none (model.gate=none); "
        "use fixed loops, or a policy that reads states or predictions"
    )


def test_a_policy_reads_the_states_before_the_coda():
    model = tiny(coda_layers=1)
    params = init_params(model, jax.random.key(0))
    tokens = np.arange(8, dtype=np.int32)[None] % 13
    output = model.apply({"params": params}, jnp.asarray(tokens), loops=LOOPS, return_state=True)
    sizes = np.linalg.norm(output.state, axis=-1)[1:]
    changes = np.linalg.norm(np.diff(output.state, axis=0), axis=-1) / sizes
    # Different positions exit at different loops.
    policy = RelativeStateDifference(threshold=float(np.median(changes)))
    leaves = np.concatenate([np.zeros((1, 1, 8), bool), changes < policy.threshold])
    leaves[-1] = True

    positions = np.arange(8, dtype=np.int32)[None]
    scores = score_windows(model, params, tokens, positions, tokens, loops=LOOPS, policy=policy)
    np.testing.assert_array_equal(scores.loops[0], np.argmax(leaves, axis=0) + 1)
    assert len(np.unique(scores.loops)) > 1
