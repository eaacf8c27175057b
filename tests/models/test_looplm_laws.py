"""Laws of the forward pass, for every option of the architecture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from looplm_reference import reference_forward
from tiny_models import (
    BASE,
    IN_SHORT,
    LENGTH,
    OPTIONS,
    compiled_forward,
    one_segment,
    plain_positions,
    random_tokens,
    tiny_model,
)

from looplm_jax.models._blocks import make_context
from looplm_jax.models._looplm import head_matrix

every_option = pytest.mark.parametrize(
    "option", [option if option in IN_SHORT else pytest.param(option, marks=pytest.mark.slow) for option in OPTIONS]
)


def assert_close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def two_documents():
    """Returns segment ids and positions of rows with a document of two tokens and one of four."""
    segments = jnp.where(plain_positions() < 2, 1, 2)
    return segments, jnp.where(segments == 1, plain_positions(), plain_positions() - 2)


@every_option
def test_scan_equals_a_reference_with_python_loops(option):
    model, params = tiny_model(option)
    segments, positions = two_documents()
    output = compiled_forward(option)(random_tokens(), positions, segments)
    hidden, gates = reference_forward(params, model.config, BASE.loops, random_tokens(), positions, segments)
    assert_close(output.hidden, hidden)
    assert_close(output.gate_logits, gates)


def test_gradients_equal_those_of_the_reference():
    model, params = tiny_model("grouped_tied")
    segments, positions = two_documents()

    def by_scan(params):
        output = model.apply({"params": params}, random_tokens(), loops=2, positions=positions, segment_ids=segments)
        return output.hidden, output.gate_logits

    def by_reference(params):
        return reference_forward(params, model.config, 2, random_tokens(), positions, segments)

    def gradient(forward):
        def score(params):
            hidden, gates = forward(params)
            weights = jnp.arange(1.0, 17.0)  # RMSNorm fixes the norm of a state, so a plain sum of squares is constant
            return jnp.sum(hidden * weights[None, None, None]) / 100 + jnp.sum(gates**2)

        return jax.jit(jax.grad(score))(params)

    jax.tree.map(lambda a, b: assert_close(a, b, 2e-3), gradient(by_scan), gradient(by_reference))


@pytest.mark.parametrize("option", ["ouro", "prelude_linear_coda"])
def test_scan_equals_one_loop_step_after_another(option):
    model, params = tiny_model(option)
    context = make_context(model.config, plain_positions(), one_segment())
    step = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs, method="loop_step")[0])
    embedded, _ = model.apply({"params": params}, random_tokens(), context, method="embed")
    output = compiled_forward(option)(random_tokens(), plain_positions(), one_segment())
    state = model.initial_state(embedded)
    for loop in range(BASE.loops):
        result = step(state, embedded, context, loop)
        assert_close(output.hidden[loop], result.hidden)
        assert_close(output.gate_logits[loop], result.gate_logits)
        state = result.state


@every_option
def test_causal_at_every_position(option):
    """Row j differs from the original in token j: outputs before j are bit-identical, and the output at j differs."""
    tokens = jnp.broadcast_to(random_tokens()[0], (LENGTH, LENGTH))
    other = jnp.where(jnp.eye(LENGTH, dtype=bool), (tokens + 1) % BASE.vocab_size, tokens)
    before, after = (compiled_forward(option)(x, plain_positions(), one_segment()) for x in (tokens, other))
    for j in range(LENGTH):
        np.testing.assert_array_equal(before.hidden[:, j, :j], after.hidden[:, j, :j])
        np.testing.assert_array_equal(before.gate_logits[:, j, :j], after.gate_logits[:, j, :j])
        for loop in range(BASE.loops):
            assert not np.array_equal(before.hidden[loop, j, j], after.hidden[loop, j, j])
        assert not np.array_equal(before.hidden[0, j, -1], after.hidden[0, j, -1])


def lengths_of_documents():
    return st.lists(st.integers(1, LENGTH), min_size=1, max_size=LENGTH).filter(lambda sizes: sum(sizes) <= LENGTH)


@pytest.mark.parametrize("option", ["ouro", "prelude_linear_coda"])
@given(sizes=lengths_of_documents(), seed=st.integers(0, 3))
def test_packed_documents_equal_the_same_documents_in_rows_of_their_own(option, sizes, seed):
    texts = np.asarray(random_tokens(seed))
    packed, positions, segments = (np.zeros((LENGTH, LENGTH), np.int32) for _ in range(3))
    alone, alone_segments = np.zeros_like(packed), np.zeros_like(packed)
    start = 0
    for index, size in enumerate(sizes):
        place = slice(start, start + size)
        packed[0, place], positions[0, place], segments[0, place] = texts[index, :size], range(size), index + 1
        alone[index, :size], alone_segments[index, :size] = texts[index, :size], 1
        start += size
    forward = compiled_forward(option)
    together = forward(*(jnp.asarray(x) for x in (packed, positions, segments)))
    apart = forward(jnp.asarray(alone), plain_positions(), jnp.asarray(alone_segments))
    start = 0
    for index, size in enumerate(sizes):
        assert_close(together.hidden[:, 0, start : start + size], apart.hidden[:, index, :size])
        assert_close(together.gate_logits[:, 0, start : start + size], apart.gate_logits[:, index, :size])
        start += size


def test_positions_and_segments_default_to_one_document_a_row():
    model, params = tiny_model("ouro")
    by_default = jax.jit(lambda: model.apply({"params": params}, random_tokens()))()
    spelled_out = compiled_forward("ouro")(random_tokens(), plain_positions(), one_segment())
    assert_close(by_default.hidden, spelled_out.hidden)


@pytest.mark.parametrize("option", ["ouro", "prelude_linear_coda"])
def test_longer_run_begins_with_the_shorter_one(option):
    model, params = tiny_model(option)
    longer = jax.jit(lambda: model.apply({"params": params}, random_tokens(), loops=7))()
    shorter = compiled_forward(option)(random_tokens(), plain_positions(), one_segment())
    assert longer.hidden.shape[0] == longer.gate_logits.shape[0] == 7
    assert_close(longer.hidden[: BASE.loops], shorter.hidden)
    assert_close(longer.gate_logits[: BASE.loops], shorter.gate_logits)
    assert np.isfinite(longer.hidden).all()


def test_tied_head_is_the_transposed_embedding():
    model, params = tiny_model("grouped_tied")
    assert "head" not in params
    np.testing.assert_array_equal(head_matrix(params, model.config), params["embedding"].T)
