"""An engine whose parameters are replaced, as after every step of training."""

import jax
import numpy as np
import pytest
from serving_models import SOUND, finish, make_engine, small_model

from looplm_jax.errors import UserError
from looplm_jax.inference import Engine
from looplm_jax.inference._packed_prefill import admit_pack
from looplm_jax.inference._tick import run_ticks


def test_replaced_parameters_answer_as_in_an_engine_of_their_own():
    """They compile nothing, and are refused while requests run, or if they are those of another model."""
    model, params = small_model()
    others = jax.tree.map(
        lambda leaf: leaf + np.float32(0.1) * np.cos(np.arange(leaf.size)).reshape(leaf.shape), params
    )
    others = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, np.float32), others)

    engine = make_engine()
    first = finish(engine, [engine.submit(SOUND)])[0]
    programs = run_ticks, admit_pack
    before = [program._cache_size() for program in programs]

    engine.use(others)
    second = finish(engine, [engine.submit(SOUND)])[0]
    assert [program._cache_size() for program in programs] == before
    own = Engine(model, others, config=engine.config)
    expected = finish(own, [own.submit(SOUND)])[0]
    assert (second.tokens, second.exit_loops, second.log_probs) == (
        expected.tokens,
        expected.exit_loops,
        expected.log_probs,
    )
    assert second.log_probs != first.log_probs

    handle = engine.submit(SOUND)
    with pytest.raises(UserError, match=r"^requests are running with the present parameters; wait for their results"):
        engine.use(params)
    assert finish(engine, [handle])[0].log_probs == second.log_probs
    with pytest.raises(UserError, match=r"^these parameters are those of another model; create an engine for it$"):
        engine.use({**params, "head": params["head"][:, 1:]})

    engine.use(params)
    assert finish(engine, [engine.submit(SOUND)])[0].log_probs == first.log_probs
