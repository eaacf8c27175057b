import dataclasses
import types

import numpy as np
import pytest
from harness_cases import log_probs_of
from hf_folders import MULTI_HEAD, make_tensors, write_hf_folder

pytest.importorskip("lm_eval")
pytest.importorskip("tokenizers")

from looplm_jax.errors import UserError
from looplm_jax.evaluation.harness._adapter import EveryDepth, LoopLMAdapter
from looplm_jax.evaluation.harness._settings import HarnessSettings, ModelArgs
from looplm_jax.halting import Bounded, FixedLoops, KLDivergence, QExit
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig
from looplm_jax.loading import load

CONFIG = dataclasses.replace(MULTI_HEAD, num_layers=1)
LOOPS = CONFIG.loops
WINDOW = 32


def requests(*arguments):
    return [types.SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a checkpoint with weights so small that no token dominates."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tensors = {name: tensor * np.float32(0.3) for name, tensor in make_tensors(CONFIG).items()}
    write_hf_folder(path, CONFIG, tensors=tensors)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def adapter(loaded):
    """Returns an adapter with few slots, so that four and more requests use the same engine."""
    return LoopLMAdapter(loaded, HarnessSettings(max_length=WINDOW, batch_size=4))


def expected(loaded, context, continuation, loops=LOOPS):
    log_probs, _ = log_probs_of(loaded, context, continuation, loops)
    return pytest.approx(log_probs[-1].sum(), rel=1e-5, abs=1e-5)


def test_log_likelihood_of_a_continuation(loaded, adapter):
    encode = loaded.tokenizer.encode
    (found, _), (spaced, _) = adapter.loglikelihood(requests(("a cat", " sat"), ("a cat ", "sat")))
    assert found == expected(loaded, encode("a cat"), encode(" sat"))
    assert spaced == found  # a trailing space of the context moves to the continuation


def test_an_empty_context_is_the_beginning_of_a_document(loaded, adapter):
    (found,) = adapter.loglikelihood(requests(("", "sat")))
    assert found[0] == expected(loaded, [loaded.tokenizer.bos_id], loaded.tokenizer.encode("sat"))


def test_a_bos_before_every_context_where_asked_for(loaded):
    tokenizer = loaded.tokenizer
    adapter = LoopLMAdapter(loaded, HarnessSettings(max_length=WINDOW, add_bos_token=True))
    (found,), (empty,) = (adapter.loglikelihood(requests((context, " sat"))) for context in ("a cat", ""))
    assert found[0] == expected(loaded, [tokenizer.bos_id, *tokenizer.encode("a cat")], tokenizer.encode(" sat"))
    assert empty[0] == expected(loaded, [tokenizer.bos_id], tokenizer.encode(" sat"))


def test_a_long_context_loses_its_beginning(loaded, adapter):
    context, continuation = "0123456789" * 6, "abcde"
    (found,) = adapter.loglikelihood(requests((context, continuation)))
    kept = WINDOW + 1 - len(continuation)
    assert found[0] == expected(loaded, loaded.tokenizer.encode(context)[-kept:], loaded.tokenizer.encode(continuation))


@pytest.mark.slow
def test_greedy_text_is_known_as_such(loaded, adapter):
    prompts = [f"{number}" for number in range(10, 40)]
    texts = adapter.generate_until(requests(*((prompt, {"max_gen_toks": 1}) for prompt in prompts)))
    encode = loaded.tokenizer.encode
    pairs = [pair for pair in zip(prompts, texts, strict=True) if pair[1] and "\ufffd" not in pair[1]]
    whole = [pair for pair in pairs if encode("".join(pair)) == encode(pair[0]) + encode(pair[1])]
    assert whole
    assert all(greedy for _, greedy in adapter.loglikelihood(requests(*whole)))
    assert not any(greedy for _, greedy in adapter.loglikelihood(requests(*((prompt, "zz") for prompt, _ in whole))))


def test_rolling_scores_every_token_once_with_all_the_context_there_is(loaded, adapter):
    text = "0123456789" * 7 + "abc"
    tokens = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
    count = len(tokens) - 1
    total = 0.0
    for start in range(0, count, WINDOW):  # tokens start + 1 to end are predicted
        end = min(start + WINDOW, count)
        context, scored = tokens[max(end - WINDOW, 0) : start + 1], tokens[start + 1 : end + 1]
        total += log_probs_of(loaded, context, scored, LOOPS)[0][-1].sum()
    short, empty = "abc", ""
    first, *others = adapter.loglikelihood_rolling(requests((text,), (short,), (empty,)))
    assert first == pytest.approx(total, rel=1e-5)
    assert others[0] == expected(loaded, [loaded.tokenizer.bos_id], loaded.tokenizer.encode(short))
    assert others[1] == 0


def test_text_is_that_of_the_engine_up_to_a_stop_string(loaded):
    adapter = LoopLMAdapter(loaded, HarnessSettings(policy=QExit(q=0.5), batch_size=1, max_length=WINDOW))
    config = EngineConfig(slots=1, capacity=64, loops=LOOPS, chunk=64)
    engine = Engine(loaded.model, loaded.params, loaded.tokenizer, config=config)
    long = "0123456789" * 6
    prompts = [loaded.tokenizer.encode("12"), loaded.tokenizer.encode(long)[-(WINDOW - 6) :]]
    whole = [result.text for result in engine.generate(prompts, max_new_tokens=6, policy=QExit(q=0.5))]
    arguments = {"max_gen_toks": 6, "do_sample": False, "temperature": 0.7}
    stop = whole[0][2:4]
    found = adapter.generate_until(
        requests(("12", {**arguments, "until": []}), ("12", {**arguments, "until": [stop]}), (long, arguments))
    )
    assert found == [whole[0], whole[0][: whole[0].index(stop)], whole[1]]
    assert adapter.tokens > 0
    assert 1 <= adapter.mean_loops <= LOOPS


def test_a_sweep_answers_every_depth_from_one_pass(loaded):
    adapter = EveryDepth(loaded, HarnessSettings(max_length=WINDOW), loops=LOOPS)
    asked = requests(("a cat", " sat"), ("", "sat"))
    found = []
    for depth in range(1, LOOPS + 1):
        adapter.depth = depth
        found.append(adapter.loglikelihood(asked))
        object.__setattr__(adapter, "_scorer", lambda windows: [refuse(window) for window in windows])
    encode = loaded.tokenizer.encode
    log_probs, _ = log_probs_of(loaded, encode("a cat"), encode(" sat"), LOOPS)
    np.testing.assert_allclose([one[0][0] for one in found], log_probs.sum(axis=1), rtol=1e-5)


def refuse(window):
    raise AssertionError(f"{window} was asked for before")


def test_model_args(folder):
    given = {"checkpoint": str(folder), "exit": "kl=1e-3,max=6", "batch_size": "auto:4", "max_length": 64}
    found = ModelArgs.of(
        {
            **given,
            "add_bos_token": True,
            "special_tokens": True,
            "cache": "last",
            "device": "cuda:0",
            "max_batch_size": None,
        }
    )
    assert found == ModelArgs(
        checkpoint=str(folder),
        step=None,
        settings=HarnessSettings(
            policy=Bounded(KLDivergence(threshold=1e-3), max_loops=6),
            max_length=64,
            add_bos_token=True,
            special_tokens=True,
            cache=CacheStrategy.LAST,
        ),
    )
    adapter = LoopLMAdapter.create_from_arg_string(f"checkpoint={folder},loops=2", {"batch_size": 3, "device": None})
    assert (adapter.policy, adapter.max_length) == (FixedLoops(loops=2), CONFIG.max_positions)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--model_args has no checkpoint; write --model_args checkpoint=runs/text-small exit=q=0.5"),
        ({"pretrained": "x", "checkpoint": "x"}, "unknown model argument 'pretrained'; known: add_bos_token, "),
        ({"checkpoint": "x", "max_lenght": 3}, "unknown model argument 'max_lenght'; did you mean 'max_length'?"),
        ({"checkpoint": "x", "loops": 2, "exit": "q=1"}, "loops and exit both set the exit rule; keep one"),
        ({"checkpoint": "x", "loops": 0}, "loops must be at least 1, not 0"),
        ({"checkpoint": "x", "loops": "two"}, "loops must be a whole number, not 'two'"),
        ({"checkpoint": "x", "exit": "q=2"}, "q must be in [0, 1], not 2.0"),
        ({"checkpoint": "x", "batch_size": "many"}, "batch_size must be a whole number or auto, not 'many'"),
        ({"checkpoint": "x", "batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"checkpoint": "x", "max_length": 1}, "max_length must be at least 2, not 1"),
        ({"checkpoint": "x", "add_bos_token": "yes"}, "add_bos_token must be true or false, not 'yes'"),
        ({"checkpoint": "x", "cache": "lost"}, "unknown cache 'lost'; did you mean 'last'?"),
    ],
)
def test_mistakes_in_model_args(given, message):
    with pytest.raises(UserError) as caught:
        ModelArgs.of(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_gen_toks": 32}, "32 new tokens leave no room for a prompt in the 32 that the model reads"),
        ({}, "256 new tokens leave no room"),
        ({"num_beams": 4}, "generation_kwargs num_beams=4 is not supported"),
        ({"max_new_token": 4}, "did you mean 'max_new_tokens'?"),
        ({"max_gen_toks": 2, "do_sample": True, "temperature": -1.0}, "temperature must not be negative"),
    ],
)
def test_mistakes_in_generation_kwargs(adapter, arguments, message):
    with pytest.raises(UserError) as caught:
        adapter.generate_until(requests(("12", arguments)))
    assert message in str(caught.value)


def test_chat_templates_are_refused(adapter):
    with pytest.raises(UserError, match="chat templates are not supported; leave --apply_chat_template out"):
        adapter.apply_chat_template([{"role": "user", "content": "Hello"}])


def drawn(*prompts, **changes):
    arguments = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "until": [], **changes}
    return requests(*((prompt, arguments) for prompt in prompts))


def test_repeats_of_a_prompt_are_drawn_anew(adapter):
    """In any order, and with any other requests."""
    repeats = adapter.generate_until(drawn(*["12"] * 6))
    assert len(set(repeats)) == 6
    assert adapter.generate_until(drawn("ab", "12", "cd", "12"))[1::2] == repeats[:2]
    assert adapter.generate_until(drawn(*["12"] * 6)) == repeats
    assert adapter.generate_until(drawn(*["12"] * 6, seed=1)) != repeats


def test_sampling_without_a_temperature_is_refused(adapter):
    with pytest.raises(UserError, match=r"^generation_kwargs do_sample=True needs a temperature above 0"):
        adapter.generate_until(drawn("12", temperature=0.0))
