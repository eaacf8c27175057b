import jax.numpy as jnp
import numpy as np

from looplm_jax.halting import QExit
from looplm_jax.inference.cache import bucket
from looplm_jax.inference.decode import decode_step, prefill
from looplm_jax.inference.traced import Traced

PROMPTS = [[3, 14, 15, 92], [65, 35], [8, 9, 79, 32, 38, 46, 26]]


def run_prefill(tiny_model, prompts, policy, *, padding=0):
    model, params = tiny_model
    tokens = np.full((len(prompts), 10), padding, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return prefill(model, params, tokens, lengths, Traced.of(policy), loops=4, capacity=16)


def test_rows_of_a_batch_do_not_see_each_other(tiny_model):
    model, params = tiny_model
    policy = QExit(q=0.5)
    among = run_prefill(tiny_model, PROMPTS, policy)
    others = run_prefill(tiny_model, [[1, 2, 3, 4, 5, 6, 7, 8], PROMPTS[1], [9]], policy)
    for token in range(7, 13):
        among = decode_step(model, params, among.cache, jnp.array([token, 30, 40]), Traced.of(policy))
        others = decode_step(model, params, others.cache, jnp.array([50, 30, token]), Traced.of(policy))
        assert among.exit_loops[1] == others.exit_loops[1]
        assert among.loops_run == max(among.exit_loops)
        np.testing.assert_allclose(among.logits[1], others.logits[1], atol=1e-5)


def test_padding_has_no_influence(tiny_model):
    model, params = tiny_model
    policy = QExit(q=0.6)
    one = run_prefill(tiny_model, PROMPTS, policy)
    other = run_prefill(tiny_model, PROMPTS, policy, padding=55)
    for token in (7, 11, 13):
        np.testing.assert_array_equal(one.logits, other.logits)
        np.testing.assert_array_equal(one.exit_loops, other.exit_loops)
        one = decode_step(model, params, one.cache, jnp.full(3, token), Traced.of(policy))
        other = decode_step(model, params, other.cache, jnp.full(3, token), Traced.of(policy))


def test_the_while_loop_stops_at_the_exit(tiny_model):
    model, params = tiny_model
    for q in (0.0, 0.5, 1.0):
        decoded = run_prefill(tiny_model, PROMPTS, QExit(q=q))
        for token in range(6):
            decoded = decode_step(model, params, decoded.cache, jnp.full(3, token), Traced.of(QExit(q=q)))
            assert decoded.loops_run == max(decoded.exit_loops)
            assert q not in (0.0, 1.0) or decoded.loops_run == {0.0: 1, 1.0: 4}[q]


def test_deeper_planes_take_the_last_loop(tiny_model):
    model, params = tiny_model
    full, early = (run_prefill(tiny_model, PROMPTS, QExit(q=1.0)) for _ in range(2))
    tokens = jnp.array([7, 8, 9])
    full = decode_step(model, params, full.cache, tokens, Traced.of(QExit(q=1.0)))
    early = decode_step(model, params, early.cache, tokens, Traced.of(QExit(q=0.0)))
    np.testing.assert_array_equal(early.cache.lengths, [len(prompt) + 1 for prompt in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        before, here = np.s_[:, :, row, : len(prompt)], np.s_[:, :, row, len(prompt)]
        for name in ("keys", "values"):
            expected = getattr(full.cache.planes.core, name)
            found = getattr(early.cache.planes.core, name)
            np.testing.assert_array_equal(found[before], expected[before])
            np.testing.assert_allclose(found[here][0], expected[here][0], atol=1e-5)
            np.testing.assert_array_equal(found[here], np.stack([found[here][0]] * 4))


def test_the_cache_is_updated_in_place(tiny_model):
    model, params = tiny_model
    decoded = run_prefill(tiny_model, PROMPTS, QExit(q=0.0))
    decode_step(model, params, decoded.cache, jnp.array([1, 2, 3]), Traced.of(QExit(q=0.0)))
    assert decoded.cache.planes.core.keys.is_deleted()


def test_buckets():
    assert [bucket(length, 1000) for length in (1, 64, 65, 128, 129, 513, 1000)] == [64, 64, 128, 128, 256, 1000, 1000]
    assert bucket(3, 20) == 20
