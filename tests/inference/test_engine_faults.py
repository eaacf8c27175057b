"""What goes wrong stays with the request that it went wrong for."""

import asyncio
import dataclasses
import re
import signal

import jax
import numpy as np
import pytest
from serving_models import CONFIG, SOUND, finish, make_engine, small_model

from looplm_jax.errors import UserError
from looplm_jax.halting import Bounded, Custom, FixedLoops, QExit
from looplm_jax.halting.signals import Needs
from looplm_jax.inference import Engine, Finish, Request

DAMAGED = 95
LONG = Request(prompt_ids=(1, 2), max_new_tokens=100, policy=FixedLoops(loops=2))


async def wait_for_ever(new):
    await asyncio.sleep(1e9)


REFUSALS = {
    "the prompt is empty; give at least one token": {"prompt_ids": ()},
    "token 96 of the prompt is not in the vocabulary of 96 tokens; use the tokenizer that the model was trained with": {
        "prompt_ids": (1, 96)
    },
    "token -1 of the prompt is not in the vocabulary of 96 tokens; use the tokenizer that the model was trained with": {
        "prompt_ids": (-1,)
    },
    "100 tokens of prompt and 29 new ones are beyond model.max_positions=128; shorten the prompt or ask for fewer": {
        "prompt_ids": (1,) * 100,
        "max_new_tokens": 29,
    },
    "4 loops are more than the 3 of this engine; use EngineConfig(loops=4)": {"policy": FixedLoops(loops=4)},
    "a floor of 4 loops is above the 3 of this engine; lower it, or use EngineConfig(loops=4)": {
        "policy": Bounded(QExit(q=0.5), min_loops=4)
    },
    "5 loops are more than the 3 of this engine; use EngineConfig(loops=5)": {
        "policy": Bounded(QExit(q=0.5), min_loops=4, max_loops=5)
    },
    "at most 8 stop_ids, not 9; use stop_strings for more": {"stop_ids": tuple(range(9))},
    "max_new_tokens must be at least 1, not 0": {"max_new_tokens": 0},
    "loops_per_token must be at least 1, not 0.5": {"loops_per_token": 0.5},
    "loops_per_token must be at least 1, not nan": {"loops_per_token": float("nan")},
    "milliseconds_per_token must be positive, not 0": {"milliseconds_per_token": 0},
    "max_new_tokens must be a whole number, not 2.5": {"max_new_tokens": 2.5},
    "max_new_tokens must be a whole number, not True": {"max_new_tokens": True},
    "max_new_tokens must be a whole number, not None": {"max_new_tokens": None},
    "sampling must be a Sampling, such as Sampling(temperature=1.0), not None": {"sampling": None},
    "sampling must be a Sampling, such as Sampling(temperature=1.0), not {'seed': 1}": {"sampling": {"seed": 1}},
    "policy must be an exit policy, such as QExit(q=0.5), not 'q=0.5'": {"policy": "q=0.5"},
    "stop id 1099511627776 is not in the vocabulary of 96 tokens, so nothing would end at it; leave it out": {
        "stop_ids": (2**40,)
    },
    "stop_ids must be a list or tuple of token ids, not {1}": {"stop_ids": {1}},
    "each of stop_ids must be a whole number, not 'a'": {"stop_ids": ("a",)},
    "each of prompt_ids must be a whole number, not 1.5": {"prompt_ids": (1, 1.5)},
    "each of prompt_ids must be a whole number, not True": {"prompt_ids": (1, True)},
    "stop_strings must be a list of strings, not (5,)": {"stop_strings": (5,)},
    "stop_strings must be a list of strings, not {'a'}": {"stop_strings": {"a"}},
    "loops_per_token must be a number, not '2'": {"loops_per_token": "2"},
    "milliseconds_per_token must be positive, not nan": {"milliseconds_per_token": float("nan")},
    "client must be a name, not ['a']": {"client": ["a"]},
    "keep_cache must be True or False, not 'yes'": {"keep_cache": "yes"},
    "past must be the cache of a Result, not int": {"past": 3},
    "on_token must be a function, not 3": {"on_token": 3},
    "on_token is an async function, which would never run; use `async for new in handle`": {"on_token": wait_for_ever},
    "a stop string is empty, so every text would end at once; leave it out": {"stop_strings": ("",)},
    "stop id -2 is negative; ids of tokens count from 0": {"stop_ids": (3, -2)},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_can_never_be_served_is_refused_at_once(engine, answer, message):
    options = {"prompt_ids": (1,), "max_new_tokens": 2} | REFUSALS[message]
    prompt = options.pop("prompt_ids")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        engine.generate([(1,), prompt], **options)
    assert not engine.step()
    assert finish(engine, [engine.submit(SOUND)])[0].tokens == answer


def test_a_request_too_large_for_the_cache():
    small = make_engine(capacity=64)
    message = "40 tokens of prompt and 30 new ones do not fit a cache of 64; use EngineConfig(capacity=70)"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        small.submit(Request(prompt_ids=(1,) * 40, max_new_tokens=30))


def test_what_needs_a_tokenizer():
    without = Engine(*small_model(), config=CONFIG)
    with pytest.raises(UserError, match=r"^text needs a tokenizer: .*; or give token ids$"):
        without.generate(["text"], max_new_tokens=1)
    with pytest.raises(UserError, match=r"^stop strings need a tokenizer to find them by; give one, or use stop_ids$"):
        without.generate([(1,)], max_new_tokens=1, stop_strings=("a",))


def test_a_full_queue_says_so(engine, answer):
    handles = [engine.submit(SOUND) for _ in range(3)]
    with pytest.raises(UserError, match=r"^3 requests are waiting; try again when some are answered$"):
        engine.submit(SOUND)
    assert [result.tokens for result in finish(engine, handles)] == [answer] * 3


def test_a_cancelled_request_leaves_the_queue_at_once(engine, answer):
    """Though all slots are taken: the next to come finds room, without a step in between."""
    busy = [engine.submit(LONG)]
    while len(busy) < CONFIG.slots:
        engine.step()
        busy.append(engine.submit(LONG))
    while len(engine._scheduler._queue):
        engine.step()
    waiting = [engine.submit(SOUND) for _ in range(3)]
    waiting[1].cancel()
    late = engine.submit(SOUND)
    assert (waiting[1].result(timeout=0).finish, len(engine._scheduler._queue)) == (Finish.CANCELLED, 3)
    waiting[0].cancel()
    engine.step()
    assert (waiting[0].result(timeout=0).finish, len(engine._scheduler._queue)) == (Finish.CANCELLED, 2)
    for handle in busy:
        handle.cancel()
    assert [result.tokens for result in finish(engine, [waiting[2], late])] == [answer] * 2


def test_a_cancelled_request_leaves_its_slot_to_the_next(engine, answer):
    handles = []
    while len(handles) < CONFIG.slots:
        handles.append(engine.submit(LONG))
        engine.step()
    waiting = engine.submit(SOUND)
    for _ in range(10):
        engine.step()
    assert not waiting.done
    handles[1].cancel()
    while not waiting.done:
        engine.step()
    assert waiting.result().tokens == answer
    assert not handles[0].done
    first, cancelled, third = finish(engine, handles)
    assert cancelled.finish is Finish.CANCELLED
    assert 0 < len(cancelled.tokens) < 100
    assert first.tokens == third.tokens
    assert cancelled.tokens == first.tokens[: len(cancelled.tokens)]


def test_a_request_can_be_cancelled_before_its_turn_and_while_its_prompt_is_read(engine, answer):
    reading = engine.submit(Request(prompt_ids=(1,) * 60, max_new_tokens=2))
    waiting, sound = engine.submit(SOUND), engine.submit(SOUND)
    engine.step()
    waiting.cancel()
    reading.cancel()
    results = finish(engine, [reading, waiting, sound])
    assert [result.finish for result in results] == [Finish.CANCELLED, Finish.CANCELLED, Finish.LENGTH]
    assert [len(result.tokens) for result in results[:2]] == [0, 0]
    assert results[2].tokens == answer


def make_damaged_engine(token):
    """Of a model that has no number for one token."""
    model, params = small_model()
    embedding = np.array(params["embedding"])
    embedding[token] = np.nan
    return Engine(model, {**params, "embedding": jax.device_put(embedding)}, config=CONFIG)


def test_logits_that_are_not_finite_end_that_request_only(answer):
    damaged_engine = make_damaged_engine(DAMAGED)
    bad = dataclasses.replace(SOUND, prompt_ids=(1, DAMAGED))
    handles = [damaged_engine.submit(request) for request in (SOUND, bad, SOUND)]
    first, failed, third = finish(damaged_engine, handles)
    assert (failed.finish, failed.tokens) == (Finish.FAILED, ())
    assert failed.error == "logits were not finite; the parameters are damaged, or overflow"
    assert first.tokens == third.tokens == answer
    with pytest.raises(UserError, match=r"^logits were not finite; "):
        list(damaged_engine.stream((DAMAGED,), max_new_tokens=3))


@pytest.mark.parametrize("where", ["prompt", "text"])
def test_the_slot_of_a_request_that_failed_is_as_good_as_new(engine, answer, where):
    """Though it held numbers that are not finite at positions which the next request never reaches."""
    sound = {*SOUND.prompt_ids, *answer}
    candidates = engine.generate([(token,) * 90 for token in range(2, 8)], max_new_tokens=1)
    prompt, damaged = next(
        (found.prompt_ids, found.tokens[0])
        for found in candidates
        if found.tokens[0] not in {*found.prompt_ids, *sound}
    )
    damaged_engine = make_damaged_engine(damaged)
    prompts = [prompt if where == "text" else (*prompt, damaged)] * CONFIG.slots
    failed = damaged_engine.generate(prompts, max_new_tokens=5)
    assert {result.finish for result in failed} == {Finish.FAILED}
    assert {result.tokens for result in failed} == {(damaged,) if where == "text" else ()}
    after = damaged_engine.generate([SOUND.prompt_ids] * CONFIG.slots, max_new_tokens=6, policy=SOUND.policy)
    assert [result.tokens for result in after] == [answer] * CONFIG.slots


def test_a_callback_that_raises_ends_its_own_request_only(engine, answer):
    def broken(new):
        if new.token == answer[2]:
            raise KeyError("lost")

    handles = [engine.submit(request) for request in (SOUND, dataclasses.replace(SOUND, on_token=broken), SOUND)]
    first, failed, third = finish(engine, handles)
    assert (failed.finish, failed.error) == (Finish.FAILED, "on_token raised KeyError: 'lost'")
    assert failed.tokens == answer[:3]
    assert first.tokens == third.tokens == answer


@pytest.mark.parametrize("fails", ["always", "with several slots"])
def test_a_policy_that_raises_ends_its_own_request_only(answer, fails):
    def exits(t, hidden, gate, logits):
        if fails == "always" or t.shape != (1,):
            raise ZeroDivisionError("no policy")
        return t > 1

    fresh = make_engine()
    bad = dataclasses.replace(SOUND, policy=Custom(exits, needs=Needs(0)))
    handles = [fresh.submit(request) for request in (SOUND, bad, SOUND)]
    first, failed, third = finish(fresh, handles)
    assert (failed.finish, failed.error) == (Finish.FAILED, "the exit policy raised ZeroDivisionError: no policy")
    assert first.tokens == third.tokens == answer


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_stream_leaves_its_text_and_a_usable_engine(engine, answer):
    shown = []

    def watch():
        for new in engine.stream("abc", max_new_tokens=50):
            shown.append(new.text)
            if len(shown) == 4:
                interrupt()

    with pytest.raises(KeyboardInterrupt):
        watch()
    assert len("".join(shown)) == 4
    assert not engine.step()
    assert finish(engine, [engine.submit(SOUND)])[0].tokens == answer


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_between_two_ticks_costs_the_others_no_token(engine, answer, monkeypatch):
    """Ctrl-C comes while the host waits for a tick: that is where it spends its time."""
    other, stream = engine.submit(SOUND), engine.stream("abc", max_new_tokens=50)
    shown = [next(stream).text for _ in range(2)]
    fetch, raised = jax.device_get, []

    def interrupted_once(tree):
        if not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGINT)
        return fetch(tree)

    monkeypatch.setattr(jax, "device_get", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        shown.append(next(stream).text)
    assert finish(engine, [other])[0].tokens == answer
    assert len("".join(shown)) == 2


def test_an_interrupted_batch_is_given_up(engine, answer):
    """Otherwise it would continue in the background of later requests."""
    with pytest.raises(KeyboardInterrupt):
        engine.generate([(1,)] * 7, max_new_tokens=100, on_token=lambda _: interrupt())
    ticks = engine.stats.ticks
    assert finish(engine, [engine.submit(SOUND)])[0].tokens == answer
    assert engine.stats.ticks - ticks < 50


def test_a_thread_that_serves_survives_bad_requests(engine, answer):
    def broken(new):
        raise ValueError("no")

    with engine.serving():
        failed = engine.submit(dataclasses.replace(SOUND, on_token=broken)).result(timeout=60)
        assert failed.finish is Finish.FAILED
        assert engine.submit(SOUND).result(timeout=60).tokens == answer


def test_a_tick_that_fails_ends_what_was_in_the_slots_only(answer, monkeypatch):
    """The slots were donated to it: they are lost, and created again."""
    broken = make_engine(slots=1, queue=3)
    tick = broken._decoder.tick

    def fail_once():
        monkeypatch.setattr(broken._decoder, "tick", tick)
        for leaf in jax.tree.leaves(broken._decoder._slots):
            leaf.delete()
        raise MemoryError("out of memory")

    monkeypatch.setattr(broken._decoder, "tick", fail_once)
    with broken.serving():
        results = [handle.result(timeout=60) for handle in [broken.submit(LONG), broken.submit(SOUND)]]
    assert [result.finish for result in results] == [Finish.FAILED, Finish.LENGTH]
    assert results[0].error == "the engine had to start over (MemoryError: out of memory)"
    assert results[1].tokens == answer


@pytest.mark.parametrize(
    ("where", "tokens"),
    [("start_prefill", 1), ("admit_pack", 1), ("start_prefill", 40), ("read_chunk", 40), ("admit", 40)],
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_failure_while_a_prompt_is_read_ends_that_request_only(answer, monkeypatch, where, tokens, lost):
    """And those in the slots, if the program that failed took these with it."""
    broken = make_engine()
    others = [broken.submit(SOUND), broken.submit(SOUND)]
    while not all(broken._scheduler._slots[:2]):
        broken.step()
    whole = getattr(broken._decoder, where)

    def fail_once(*_):
        monkeypatch.setattr(broken._decoder, where, whole)
        if lost:
            jax.tree.leaves(broken._decoder._slots)[0].delete()
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(broken._decoder, where, fail_once)
    prompt = dataclasses.replace(SOUND, prompt_ids=SOUND.prompt_ids * tokens)
    failing = broken.submit(prompt)
    while not failing.done:
        broken.step()
    failed, after = finish(broken, [failing, broken.submit(SOUND)])
    assert broken._decoder._pool.free == broken.config.pool.pages
    assert (failed.finish, failed.error) == (Finish.FAILED, "its prompt: RuntimeError: no luck")
    assert after.tokens == answer
    expected = Finish.FAILED if lost else Finish.LENGTH
    assert [handle.result(timeout=0).finish for handle in others] == [expected] * 2


def test_nobody_waits_for_an_engine_that_broke(monkeypatch):
    broken = make_engine(slots=1, queue=3)

    def no_memory():
        raise MemoryError("out of memory")

    for name in ("tick", "start_over"):
        monkeypatch.setattr(broken._decoder, name, no_memory)
    with broken.serving():
        results = [handle.result(timeout=60) for handle in [broken.submit(SOUND), broken.submit(LONG)]]
        with pytest.raises(UserError, match=r"the engine has stopped \(MemoryError: out of memory\); make a new one"):
            broken.submit(SOUND)
    assert [result.finish for result in results] == [Finish.FAILED] * 2
    assert "out of memory" in results[0].error
