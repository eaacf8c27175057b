import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_models import make_model

from looplm_jax.config import Injection
from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops, QExit, exit_distribution, q_exit
from looplm_jax.inference import Finish, Sampling, generate
from looplm_jax.inference._packed_prefill import admit_pack
from looplm_jax.inference._prefill import admit, prefill_chunk
from looplm_jax.inference._tick import run_ticks
from looplm_jax.models._looplm import head_matrix

PROMPT = [3, 14, 15, 92, 65, 35]
SHAPES = {
    "grouped-query": {},
    "multi-head, injection": {"num_kv_heads": 4, "injection": Injection.LINEAR},
    "prelude, coda, tied": {"prelude_layers": 1, "coda_layers": 2, "tied_head": True, "injection": Injection.ADD},
}


def full_forward(model, params, tokens, loops):
    """Log-probabilities [T, S, V] and gate logits [T, S] of one sequence, without any cache."""
    return _forward(model, params, jnp.array([tokens]), loops)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _forward(model, params, tokens, loops):
    output = model.apply({"params": params}, tokens, loops=loops)
    logits = output.hidden[:, 0] @ head_matrix(params, model.config)
    return jax.nn.log_softmax(logits), output.gate_logits[:, 0]


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param("grouped-query", marks=pytest.mark.slow),
        pytest.param("multi-head, injection", marks=pytest.mark.slow),
        "prelude, coda, tied",
    ],
)
def test_full_cache_equals_full_forward(shape):
    model, params = make_model(**SHAPES[shape])
    made = generate(model, params, PROMPT, max_new_tokens=12, policy=FixedLoops(loops=3))
    log_probs, _ = full_forward(model, params, [*PROMPT, *made.tokens], loops=3)
    predicted = log_probs[2, len(PROMPT) - 1 : -1]
    assert made.tokens == tuple(np.argmax(predicted, axis=-1))
    np.testing.assert_allclose(made.log_probs, np.max(predicted, axis=-1), atol=1e-4)
    assert set(made.exit_loops) == {3}


@pytest.mark.slow
def test_more_loops_than_the_model_is_meant_for():
    model, params = make_model(num_layers=1)
    made = generate(model, params, PROMPT, max_new_tokens=5, policy=FixedLoops(loops=6))
    log_probs, _ = full_forward(model, params, [*PROMPT, *made.tokens], loops=6)
    assert made.tokens == tuple(np.argmax(log_probs[5, len(PROMPT) - 1 : -1], axis=-1))


def test_the_ends_of_q_are_one_loop_and_all(tiny_model):
    model, params = tiny_model

    def tokens(policy):
        made = generate(model, params, PROMPT, max_new_tokens=10, policy=policy)
        return made.tokens, made.exit_loops

    assert tokens(QExit(q=1.0)) == tokens(FixedLoops(loops=4))
    assert tokens(QExit(q=0.0)) == tokens(FixedLoops(loops=1))
    assert tokens(QExit(q=0.0))[1] == (1,) * 10


@pytest.mark.parametrize("q", [0.2, 0.5, 0.8])
def test_exit_loops_are_those_of_the_exit_distribution(tiny_model, q):
    model, params = tiny_model
    for last in range(8):  # while the whole past is full, early exit sees what a full pass sees
        prompt = [*PROMPT, last]
        made = generate(model, params, prompt, max_new_tokens=2, policy=QExit(q=q))
        log_probs, gates = full_forward(model, params, [*prompt, made.tokens[0]], loops=4)
        expected = q_exit(exit_distribution(gates), q)[-2:]
        assert made.exit_loops == tuple(expected.tolist())
        assert made.tokens == tuple(
            int(jnp.argmax(log_probs[loop - 1, place])) for loop, place in zip(made.exit_loops, (-2, -1), strict=True)
        )


def test_early_exit_runs_fewer_loops(tiny_model):
    model, params = tiny_model
    made = generate(model, params, PROMPT, max_new_tokens=40, policy=QExit(q=0.5))
    assert 1 < made.mean_loops < 4
    assert set(made.exit_loops) <= {1, 2, 3, 4}


def test_tokens_stream_in_order_and_stop(tiny_model):
    model, params = tiny_model
    whole = generate(model, params, PROMPT, max_new_tokens=10, policy=QExit(q=0.5))
    stop = whole.tokens[4]
    seen = []
    made = generate(
        model, params, PROMPT, max_new_tokens=10, policy=QExit(q=0.5), stop_ids={stop}, on_token=seen.append
    )
    assert made.finish is Finish.STOP
    assert made.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert [new.token for new in seen] == list(made.tokens)
    assert [new.exit_loop for new in seen] == list(made.exit_loops)
    assert [new.log_prob for new in seen] == list(made.log_probs)
    assert (whole.finish, whole.prompt_ids) == (Finish.LENGTH, tuple(PROMPT))


def test_seeds_reproduce(tiny_model):
    model, params = tiny_model

    def tokens(seed, count=12):
        sampling = Sampling(temperature=1.0, seed=seed)
        return generate(
            model, params, PROMPT, max_new_tokens=count, policy=FixedLoops(loops=2), sampling=sampling
        ).tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(1, count=5) == tokens(1)[:5]


def test_one_program_for_a_bucket(tiny_model):
    model, params = tiny_model

    def sizes():
        return [program._cache_size() for program in (prefill_chunk, admit, admit_pack, run_ticks)]

    def make(prompt, count, q, temperature):
        sampling = Sampling(temperature=temperature, top_k=int(10 * temperature))
        generate(model, params, prompt, max_new_tokens=count, policy=QExit(q=q), sampling=sampling)

    make(PROMPT, 4, 0.5, 0.0)
    before = sizes()
    make([1], 1, 0.0, 1.0)
    make(PROMPT * 3, 7, 0.9, 0.5)
    make([7] * 60, 4, 1.0, 0.0)
    assert sizes() == before
    make([7] * 60, 5, 1.0, 0.0)  # 65 positions: the cache, which prompts are read into, is of the next bucket
    assert [after - count for after, count in zip(sizes(), before, strict=True)] == [0, 0, 1, 1]


def test_the_last_position_can_be_filled(tiny_model):
    model, params = tiny_model
    longest = model.config.max_positions
    made = generate(model, params, [5] * (longest - 2), max_new_tokens=2, policy=QExit(q=1.0))
    log_probs, _ = full_forward(model, params, [5] * (longest - 2) + list(made.tokens), loops=4)
    assert made.tokens == tuple(np.argmax(log_probs[3, -3:-1], axis=-1))


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 5, "the prompt is empty; give at least one token"),
        ([1], 0, "max_new_tokens must be at least 1, not 0"),
        ([1, 97], 5, "token 97 of the prompt is not in the vocabulary of 97 tokens"),
        ([-1], 5, "token -1 of the prompt is not in the vocabulary"),
        ([1] * 120, 9, "120 tokens of prompt and 9 new ones are beyond model.max_positions=128"),
    ],
)
def test_bad_prompts(tiny_model, prompt, count, message):
    with pytest.raises(UserError, match=message):
        generate(*tiny_model, prompt, max_new_tokens=count, policy=FixedLoops(loops=1))
