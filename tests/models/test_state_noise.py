"""Noise on the state after every loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import one_segment, plain_positions, random_tokens, tiny_model

from looplm_jax.models._blocks import make_context

STD = 0.1


@functools.cache
def compiled(option):
    model, params = tiny_model(option)

    @functools.partial(jax.jit, static_argnames="noise")
    def forward(tokens, key, numbers=None, *, noise=STD):
        rngs = {"noise": key} if noise else {}
        return model.apply({"params": params}, tokens, loops=2, state_noise=noise, token_numbers=numbers, rngs=rngs)

    return forward


def test_noise_reaches_the_head_the_gate_and_the_next_loop():
    """Compares each loop with the same loop without noise, started from the noisy state before it."""
    model, params = tiny_model("ouro")
    plain, noisy = (compiled("ouro")(random_tokens(), jax.random.key(3), noise=noise) for noise in (0.0, STD))

    @jax.jit
    def next_loop(state):
        context = make_context(model.config, plain_positions(), one_segment())
        return model.apply({"params": params}, state, state, context, 0, method="loop_step")[0].hidden

    first, second = noisy.hidden[0] - plain.hidden[0], noisy.hidden[1] - next_loop(noisy.hidden[0])
    for noise in (first, second):
        assert 0.9 * STD < np.std(noise) < 1.1 * STD
    assert abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 0.2  # every loop has its own
    gate = params["gate"]["kernel"]
    np.testing.assert_allclose(noisy.gate_logits[0] - plain.gate_logits[0], first @ gate, atol=1e-5)


def test_noise_of_std_zero_is_the_plain_pass():
    model, params = tiny_model("ouro")
    plain = jax.jit(lambda tokens: model.apply({"params": params}, tokens, loops=2))(random_tokens())
    zero = compiled("ouro")(random_tokens(), jax.random.key(0), noise=0.0)
    np.testing.assert_array_equal(zero.hidden, plain.hidden)


def test_the_noise_of_a_token_follows_from_the_key_and_its_number_alone():
    forward, key, tokens = compiled("ouro"), jax.random.key(5), random_tokens()
    numbers = jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape)
    whole = forward(tokens, key, numbers)
    np.testing.assert_array_equal(forward(tokens, key).hidden, whole.hidden)
    reverse = forward(tokens[::-1], key, numbers[::-1])
    np.testing.assert_allclose(reverse.hidden[:, ::-1], whole.hidden, atol=1e-5)
    for other in (forward(tokens, key, numbers + 1), forward(tokens, jax.random.key(6), numbers)):
        assert np.abs(other.hidden - whole.hidden).max() > 0.05
