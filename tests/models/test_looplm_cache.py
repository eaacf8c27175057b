"""Decoding from the cache of `prefill` equals the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BASE, IN_SHORT, LENGTH, OPTIONS, compiled_forward, plain_positions, random_tokens, tiny_model

from looplm_jax.models._blocks import make_context


@pytest.mark.parametrize(
    "option", [option if option in IN_SHORT[1:] else pytest.param(option, marks=pytest.mark.slow) for option in OPTIONS]
)
def test_decoding_the_last_token_equals_the_full_forward(option):
    """Row b has b padding tokens on the left; its positions count from its first real token."""
    model, params = tiny_model(option)
    padding = jnp.arange(LENGTH)[:, None]
    segments = (plain_positions() >= padding).astype(jnp.int32)
    positions, tokens = jnp.maximum(plain_positions() - padding, 0), random_tokens()
    full = compiled_forward(option)(tokens, positions, segments)

    def prefill(model):
        """Returns the cache of all tokens except the last, and the embedding of the last."""
        before, last = slice(None, -1), slice(-1, None)
        context = make_context(
            model.config, positions[:, last], segments[:, last], positions[:, before], segments[:, before]
        )
        _, cache = model.prefill(tokens[:, before], positions=positions[:, before], segment_ids=segments[:, before])
        embedded, _ = model.embed(tokens[:, last], context, cache.prelude)
        return cache, context, embedded

    cache, context, embedded = jax.jit(lambda: model.apply({"params": params}, method=prefill))()
    step = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs, method="loop_step")[0])
    state = model.initial_state(embedded)
    for loop in range(BASE.loops):
        core, coda = jax.tree.map(lambda leaf, loop=loop: leaf[loop], (cache.core, cache.coda))
        output = step(state, embedded, context, loop, core, coda)
        np.testing.assert_allclose(output.hidden[:, 0], full.hidden[loop, :, -1], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(output.gate_logits[:, 0], full.gate_logits[loop, :, -1], rtol=2e-5, atol=2e-5)
        state = output.state


@pytest.mark.parametrize("option", OPTIONS)
def test_cache_holds_the_prelude_once_and_core_and_coda_for_each_loop(option):
    model, params = tiny_model(option)
    config = model.config
    _, cache = jax.eval_shape(lambda: model.apply({"params": params}, random_tokens(), method="prefill"))
    rows = (LENGTH, LENGTH, config.kv_heads, config.head_width)
    assert cache.core.keys.shape == cache.core.values.shape == (config.loops, config.num_layers, *rows)
    assert (cache.prelude is None) == (config.prelude_layers == 0)
    assert (cache.coda is None) == (config.coda_layers == 0)
    if cache.prelude is not None:
        assert cache.prelude.keys.shape == (config.prelude_layers, *rows)
    if cache.coda is not None:
        assert cache.coda.keys.shape == (config.loops, config.coda_layers, *rows)


def test_a_plain_call_keeps_no_cache():
    model, params = tiny_model("prelude_linear_coda")
    tokens = random_tokens()
    _, cache = jax.eval_shape(lambda: model.apply({"params": params}, tokens, return_cache=False, method="prefill"))
    assert cache is None
