"""Huginn as options of the looped block equals its published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huginn_golden import CONFIG, huginn_arrays, huginn_params, huginn_ring_logits

from looplm_jax.inference import CacheStrategy, Engine, EngineConfig
from looplm_jax.models._blocks import make_context
from looplm_jax.models._looplm import LoopLM, head_matrix, init_params

MODEL = LoopLM(CONFIG)


def tokens():
    return jnp.asarray(huginn_arrays()["tokens"])


def run(params, loops, constant=0):
    """Returns the embedded input, and states and hidden states of all loops, the first `constant` without gradient."""

    def forward(model):
        positions = jnp.broadcast_to(jnp.arange(tokens().shape[1]), tokens().shape)
        context = make_context(model.config, positions, jnp.ones_like(positions))
        embedded, _ = model.embed(tokens(), context)

        def loop(params, embedded, state, done):
            output, _, _ = LoopLM(CONFIG).apply({"params": params}, state, embedded, context, done, method="loop_step")
            return output.state, output

        start = jnp.asarray(huginn_arrays()["initial_state"])
        free = jax.lax.stop_gradient((params, embedded))
        state, early = jax.lax.scan(lambda state, t: loop(*free, state, t), start, jnp.arange(constant))
        _, late = jax.lax.scan(lambda state, t: loop(params, embedded, state, t), state, jnp.arange(constant, loops))
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, late)
        return embedded, both.state, both.hidden

    return MODEL.apply({"params": params}, method=forward)


def assert_close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


def test_golden_tree_is_the_tree_of_our_own_parameters():
    ours = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, ours) == jax.tree.map(lambda x: x.shape, huginn_params())


def test_states_and_logits_at_every_depth():
    golden, params = huginn_arrays(), huginn_params()
    embedded, states, hidden = jax.jit(lambda: run(params, 64))()
    assert_close(embedded, golden["prelude"])
    assert_close(states[:8], golden["states"][1:])
    assert_close(hidden[:8], golden["hidden"])

    logits = hidden @ head_matrix(params, CONFIG)
    assert_close(logits[:8], golden["logits"])
    for loops in (16, 32, 64):
        assert_close(logits[loops - 1], golden[f"logits_r{loops}"])


@pytest.mark.parametrize(("constant", "kept"), [pytest.param(0, 8, marks=pytest.mark.slow), (5, 3)])
def test_loss_and_gradients_of_the_last_loops(constant, kept):
    golden, labels = huginn_arrays(), huginn_arrays()["labels"]
    counted = labels >= 0

    def loss_of(params):
        _, _, hidden = run(params, 8, constant)
        log_probs = jax.nn.log_softmax(hidden[-1] @ head_matrix(params, CONFIG))
        chosen = jnp.take_along_axis(log_probs, jnp.asarray(np.maximum(labels, 0))[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(counted, chosen, 0.0)) / float(counted.sum())

    prefix = f"grad_{constant}_{kept}/"
    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(huginn_params())
    np.testing.assert_allclose(loss, golden[f"{prefix}loss"], rtol=1e-5)

    def theirs(name):
        return golden[f"{prefix}transformer.{name}.weight"]

    core, coda = gradients["core"]["layers"], gradients["coda"]["layers"]
    pairs = [
        (gradients["embedding"], theirs("wte")),
        (gradients["injection"].T, theirs("adapter")),
        (core["mlp"]["down"]["kernel"][2].T, theirs("core_block.2.mlp.proj")),
        (core["attention_post_norm"]["scale"][3], theirs("core_block.3.norm_2")),
        (coda["attention"]["out"]["kernel"][1].reshape(32, 32).T, theirs("coda.1.attn.proj")),
        (gradients["norm"]["scale"], theirs("ln_f")),
    ]
    for ours, golden_gradient in pairs:
        np.testing.assert_allclose(ours, golden_gradient, rtol=0, atol=1e-4 * np.abs(golden_gradient).max())


@pytest.mark.slow
def test_engine_decodes_as_the_published_generator_from_a_zero_state():
    ids = [int(token) for token in huginn_arrays()["decode/full/ids"]]
    engine = Engine(MODEL, huginn_params(), config=EngineConfig(slots=1, capacity=16))
    result = engine.generate([ids[:5]], max_new_tokens=6)[0]
    assert list(result.tokens) == ids[5:]


@pytest.mark.slow
@pytest.mark.parametrize("planes", [1, 2, 4])
def test_engine_decodes_with_the_published_ring_caches(planes):
    ids = [int(token) for token in huginn_arrays()["decode/full/ids"]]
    config = EngineConfig(slots=1, capacity=16, cache=CacheStrategy(f"ring({planes})"))
    result = Engine(MODEL, huginn_params(), config=config).generate([ids[:5]], max_new_tokens=6)[0]
    assert list(result.tokens) == ids[5:]

    # These logits differ by 1e-4 and more between caches.
    log_probs = jax.nn.log_softmax(huginn_ring_logits(planes))[jnp.arange(6), jnp.array(ids[5:])]
    np.testing.assert_allclose(result.log_probs, log_probs, atol=3e-5)
