"""The chunked cross-entropy equals the naive one in value and gradient, without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import assert_trees_close, naive_losses, random_case
from program_shapes import hlo_sizes, jaxpr_sizes

from looplm_jax.losses import stage1_from_hidden, token_entropies, token_losses, token_scores, weighted_token_losses

sizes = st.fixed_dictionaries(
    {
        "loops": st.sampled_from([1, 3]),
        "batch": st.sampled_from([1, 2]),
        "length": st.sampled_from([1, 5, 8]),
        "vocab": st.sampled_from([2, 11]),
    }
)
chunks = st.sampled_from([1, 3, 8, 128])
# Each is compiled. A chunk is one token, does not divide the tokens, is all of them, or is longer.
FEW = [
    ({"loops": 1, "batch": 2, "length": 5, "vocab": 11}, 1),
    ({"loops": 3, "batch": 2, "length": 5, "vocab": 11}, 3),
    ({"loops": 3, "batch": 1, "length": 8, "vocab": 2}, 8),
    ({"loops": 3, "batch": 1, "length": 1, "vocab": 11}, 128),
]


@functools.partial(jax.jit, static_argnames="chunk")
def three_ways(hidden, head, targets, weights, chunk):
    """Returns values and gradients in hidden, head and weights: naive, rematerialized, and in one pass."""

    def naive(hidden, head, weights):
        losses = naive_losses(hidden, head, targets)
        return jnp.sum(weights * losses), losses

    def rematted(hidden, head, weights):
        losses = token_losses(hidden, head, targets, chunk=chunk)
        return jnp.sum(weights * losses), losses

    def weighted(hidden, head, weights):
        return weighted_token_losses(hidden, head, targets, weights, chunk=chunk)

    ways = (jax.value_and_grad(way, argnums=(0, 1, 2), has_aux=True) for way in (naive, rematted, weighted))
    return [way(hidden, head, weights) for way in ways]


@pytest.mark.parametrize(
    "shapes_and_chunks",
    [st.sampled_from(FEW), pytest.param(st.tuples(sizes, chunks), marks=pytest.mark.slow)],
    ids=["few", "all"],
)
@settings(max_examples=12)
@given(st.data(), st.integers(0, 99))
def test_chunks_change_neither_value_nor_gradient(shapes_and_chunks, data, seed):
    shape, chunk = data.draw(shapes_and_chunks)
    case = random_case(**shape, seed=seed)
    naive, rematted, weighted = three_ways(case.hidden, case.head, case.targets, case.gates, chunk)
    assert_trees_close(rematted, naive)
    assert_trees_close(weighted, naive)


def test_weighted_losses_without_gradient_equal_those_with_it():
    case = random_case()
    plain = weighted_token_losses(case.hidden, case.head, case.targets, case.gates, chunk=4)
    assert_trees_close(plain, three_ways(case.hidden, case.head, case.targets, case.gates, 4)[0][0])


def test_gradients_are_scaled_by_what_the_sum_is_multiplied_with():
    case = random_case()

    def scaled(factor):
        def loss(hidden, head, weights):
            return factor * weighted_token_losses(hidden, head, case.targets, weights, chunk=4)[0]

        return jax.grad(loss, argnums=(0, 1, 2))(case.hidden, case.head, case.gates)

    assert_trees_close(scaled(-3.0), jax.tree.map(lambda x: -3.0 * x, scaled(1.0)))


def test_the_losses_beside_the_weighted_sum_are_constants():
    case = random_case()
    gradient = jax.grad(lambda h: jnp.sum(weighted_token_losses(h, case.head, case.targets, case.gates)[1]))
    np.testing.assert_array_equal(gradient(case.hidden), 0)


def test_scores_tell_loss_and_correctness():
    case = random_case()
    scores = token_scores(case.hidden, case.head, case.targets, chunk=4)
    assert_trees_close(scores.loss, naive_losses(case.hidden, case.head, case.targets))
    np.testing.assert_array_equal(scores.correct, jnp.argmax(case.hidden @ case.head, axis=-1) == case.targets[None])


@pytest.mark.parametrize("function", [token_losses, lambda *x: weighted_token_losses(*x, jnp.ones((3, 2, 6)))[1]])
def test_bfloat16_states_give_float32_losses_close_to_those_of_the_same_states_in_float32(function):
    """Products are summed in float32, so the only error is the head's rounding to bfloat16 (2^-8 relative)."""
    case = random_case()
    states = case.hidden.astype(jnp.bfloat16)
    losses = function(states, case.head, case.targets)
    assert losses.dtype == jnp.float32
    exact = naive_losses(states, case.head, case.targets)
    size = 2 * jnp.max(jnp.abs(states.astype(jnp.float32)) @ jnp.abs(case.head))
    np.testing.assert_allclose(losses, exact, atol=float(size) * 2**-8)


def test_bfloat16_gradients_keep_the_dtype_of_what_they_belong_to():
    case = random_case()
    states = case.hidden.astype(jnp.bfloat16)

    def loss(hidden, head):
        return weighted_token_losses(hidden, head, case.targets, case.gates)[0]

    ours = jax.grad(loss, argnums=(0, 1))(states, case.head)
    assert [g.dtype for g in ours] == [jnp.bfloat16, jnp.float32]
    exact = jax.grad(loss, argnums=(0, 1))(states.astype(jnp.float32), case.head)
    for a, b in zip(ours, exact, strict=True):
        error = np.asarray(a, np.float32) - np.asarray(b)
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(b)


class TestMemory:
    """With T=3, B=2, S=12, V=31 and chunks of 4, there are 2232 logits in total and 248 in a chunk."""

    case = random_case(loops=3, batch=2, length=12, vocab=31)
    all_logits, largest_allowed = 3 * 2 * 12 * 31, 3 * 2 * 12 * 5  # the latter is `hidden` itself

    def programs(self, loss):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        inputs = (self.case.hidden, self.case.head, self.case.gates)
        return step.trace(*inputs).jaxpr.jaxpr, step.lower(*inputs).compile().as_text()

    def chunked(self, hidden, head, gates):
        return stage1_from_hidden(hidden, head, self.case.targets, gates, beta=0.1, mask=self.case.mask, chunk=4)[0]

    def rematted(self, hidden, head, gates):
        return jnp.sum(gates * token_losses(hidden, head, self.case.targets, chunk=4))

    def naive(self, hidden, head, gates):
        return jnp.sum(gates * naive_losses(hidden, head, self.case.targets))

    @pytest.mark.parametrize("name", ["chunked", "rematted"])
    def test_all_logits_never_exist_together(self, name):
        jaxpr, hlo = self.programs(getattr(self, name))
        assert max(jaxpr_sizes(jaxpr)) <= self.largest_allowed
        assert max(hlo_sizes(hlo)) <= self.largest_allowed

    def test_the_measure_finds_them_in_the_naive_form(self):
        jaxpr, hlo = self.programs(self.naive)
        assert max(jaxpr_sizes(jaxpr)) >= self.all_logits
        assert max(hlo_sizes(hlo)) >= self.all_logits


@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_entropies_are_those_of_all_logits_at_once(chunk):
    case = random_case()
    log_probs = jax.nn.log_softmax(case.hidden @ case.head)
    ours = token_entropies(case.hidden, case.head, chunk=chunk)
    assert_trees_close(ours, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))


def test_entropies_are_zero_for_certain_predictions_and_ln_v_for_uniform_ones():
    head = jnp.zeros((1, 7)).at[0, 3].set(1.0)
    ours = token_entropies(jnp.array([0.0, 1e4]).reshape(1, 1, 2, 1), head)
    np.testing.assert_allclose(ours[0, 0], [np.log(7), 0], rtol=1e-6)
