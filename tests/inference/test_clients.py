"""Clients that give up, arrive at the same time, or interrupt: the engine still serves the next one."""

import asyncio
import signal
import sys
import threading
import time

import pytest
from serving_models import CONFIG, SOUND, finish, make_engine, small_model

from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Finish, Request
from looplm_jax.inference._deferred_signals import deferred_signals

LONG = Request(prompt_ids=(1, 2), max_new_tokens=100, policy=FixedLoops(loops=3))


async def awaited(handle):
    return await handle


async def iterated(handle):
    return [new async for new in handle]


async def busy_with_a_token(handle):
    async for _ in handle:
        await asyncio.sleep(1e9)


@pytest.mark.parametrize("way", [awaited, iterated, busy_with_a_token])
def test_clients_whose_time_is_over_free_their_slots(engine, answer, way):
    """More clients than slots, each in an event loop that is closed after the timeout."""

    async def impatient(handle):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(way(handle), 0.01)

    with engine.serving():
        for _ in range(CONFIG.slots + 2):
            handle = engine.submit(LONG, wait=True)
            asyncio.run(impatient(handle))
            assert handle.result(timeout=60).finish is Finish.CANCELLED
        assert engine.submit(SOUND).result(timeout=60).tokens == answer


def test_a_shielded_request_survives_its_client(engine):
    async def impatient(handle):
        waiting = asyncio.shield(handle)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting, 0.001)
        return await handle

    with engine.serving():
        assert asyncio.run(impatient(engine.submit(LONG))).finish is Finish.LENGTH


def test_a_loop_over_tokens_that_is_left_ends_the_request(engine):
    with engine.serving():
        handle = engine.submit(LONG)
        for _ in handle.tokens():
            break
        assert handle.result(timeout=60).finish is Finish.CANCELLED


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_a_callback_raises_ends_its_own_request(engine, answer, error):
    def give_up(new):
        raise error

    bad = Request(prompt_ids=(1,), max_new_tokens=6, on_token=give_up)
    with engine.serving():
        for _ in range(CONFIG.slots + 1):
            failed = engine.submit(bad, wait=True).result(timeout=60)
            assert (failed.finish, failed.error) == (Finish.FAILED, f"on_token raised {error.__name__}:")
        assert engine.submit(SOUND).result(timeout=60).tokens == answer


def test_a_callback_that_exits_exits_its_own_caller(engine, answer):
    other = engine.submit(SOUND)
    for run in (engine.generate, lambda prompts, **options: list(engine.stream(prompts[0], **options))):
        with pytest.raises(SystemExit):
            run([(1,)], max_new_tokens=50, on_token=lambda _: sys.exit(3))
    assert finish(engine, [other])[0].tokens == answer


def test_a_callback_cannot_step_the_engine(engine, answer):
    (failed,) = engine.generate([(1,)], max_new_tokens=2, on_token=lambda _: engine.step())
    assert (
        failed.error
        == "on_token raised UserError: on_token cannot step the engine that calls it; submit a request instead"
    )
    assert finish(engine, [engine.submit(SOUND)])[0].tokens == answer


class Panic(BaseException):
    """The kind of exception that a tokenizer written in Rust raises."""


@pytest.mark.parametrize("error", [IndexError, Panic])
def test_a_tokenizer_that_raises_ends_that_request_only(engine, answer, monkeypatch, error):
    whole = engine._tokenizer.decode

    def decode(ids):
        if 5 in ids:
            raise error("id 5")
        return whole(ids)

    monkeypatch.setattr(engine._tokenizer, "decode", decode)
    failed, sound = finish(engine, [engine.submit(Request(prompt_ids=(5,), max_new_tokens=3)), engine.submit(SOUND)])
    assert (failed.finish, failed.error) == (Finish.FAILED, f"the tokenizer raised {error.__name__}: id 5")
    assert sound.tokens == answer


def test_threads_wait_for_room_in_a_short_queue(answer):
    short, results = make_engine(queue=1), {}

    def ask(number):
        results[number] = short.generate([SOUND.prompt_ids] * 4, max_new_tokens=6, policy=SOUND.policy)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [[result.tokens for result in results[number]] for number in range(4)] == [[answer] * 4] * 4


def test_a_waiting_request_costs_a_step_nothing():
    """Counts the Python and C calls of a step, with few and with many requests in the queue."""

    def calls(waiting):
        full, counted = make_engine(queue=3000), []
        busy = [full.submit(LONG) for _ in range(CONFIG.slots)]
        handles = [full.submit(SOUND) for _ in range(waiting)]
        while not all(full._scheduler._slots):
            full.step()
        for _ in range(3):
            full.step()
        handles[waiting // 2].cancel()
        sys.setprofile(lambda frame, event, argument: counted.append(event) if event.endswith("call") else None)
        try:
            full.step()
        finally:
            sys.setprofile(None)
        assert handles[waiting // 2].done
        assert not any(handle.done for handle in busy)
        return len(counted)

    calls(4)  # warm-up
    assert calls(2000) <= calls(4) + 200


@pytest.fixture
def alarm():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGALRM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("tries", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_interrupts_leave_an_engine_that_serves(tries):
    """Interrupts at any moment of `generate`, by a timer and by SIGINT from another thread."""
    busy, prompts = make_engine(), [(3, 14)] * (CONFIG.slots + 1)
    expected = [result.tokens for result in busy.generate(prompts, max_new_tokens=20)]
    start = time.perf_counter()
    busy.generate(prompts, max_new_tokens=20)
    took, interrupted = time.perf_counter() - start, 0
    for number in range(tries):
        delay = took * (number + 0.5) / tries
        timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT]) if number % 2 else None
        try:
            if timer is None:
                signal.setitimer(signal.ITIMER_REAL, delay)
            else:
                timer.start()
            busy.generate(prompts, max_new_tokens=20)
            time.sleep(took)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if timer is not None:
                timer.join()
        assert [result.tokens for result in busy.generate(prompts, max_new_tokens=20)] == expected
    assert interrupted == tries
    assert signal.getsignal(signal.SIGINT).__name__ == "interrupt"  # restored


@pytest.mark.usefixtures("alarm")
def test_an_interrupt_on_the_way_into_a_step_leaves_no_handler_behind(monkeypatch):
    whole, before, interrupts = signal.getsignal, signal.getsignal(signal.SIGINT), [KeyboardInterrupt]

    def getsignal(number):
        if number == signal.SIGALRM and interrupts:  # SIGINT is deferred by then
            assert whole(signal.SIGINT) is not before
            raise interrupts.pop()
        return whole(number)

    monkeypatch.setattr(signal, "getsignal", getsignal)
    with pytest.raises(KeyboardInterrupt), deferred_signals:
        pass
    assert whole(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be at least 1, not 0"),
        ({"slots": 1.5}, "slots must be a whole number, not 1.5"),
        ({"slots": True}, "slots must be a whole number, not True"),
        ({"capacity": -5}, "capacity must be at least 1, not -5"),
        ({"chunk": 0}, "chunk must be at least 1, not 0"),
        ({"ticks": 0}, "ticks must be at least 1, not 0"),
        ({"queue": 2**31}, "queue must be at most 2147483647, not 2147483648"),
        ({"loops": 0}, "loops must be at least 1, not 0"),
        ({"cache": "last"}, "cache must be a CacheStrategy, such as CacheStrategy.LAST, not 'last'"),
        ({"cache_dtype": "int8"}, "cache_dtype must be a floating-point type, such as jnp.bfloat16, not 'int8'"),
        ({"cache_dtype": "half?"}, "cache_dtype must be a floating-point type, such as jnp.bfloat16, not 'half?'"),
        ({"previews": 1}, "previews must be True or False, not 1"),
        ({"unroll": "yes"}, "unroll must be True or False, not 'yes'"),
    ],
)
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(UserError) as caught:
        EngineConfig(**options)
    assert str(caught.value) == message


def test_no_room_for_tokens_beyond_the_positions():
    assert Engine(*small_model(), config=EngineConfig(slots=1)).config.capacity == small_model()[0].config.max_positions


def test_a_kept_cache_of_another_engine_is_refused(engine):
    (kept,) = engine.generate([(1,)], max_new_tokens=2, keep_cache=True)
    other = make_engine(loops=2, cache=CacheStrategy.LAST)
    with pytest.raises(
        UserError, match=r"^the prefix cache has 1 layers, 3 loops and .* use the engine it comes from$"
    ):
        other.generate([(1,)], max_new_tokens=2, past=kept.cache)


def test_a_kept_cache_can_be_used_again(engine):
    (kept,) = engine.generate([(1,)], max_new_tokens=2, keep_cache=True)
    first, second = (engine.generate([(2,)], max_new_tokens=4, past=kept.cache)[0].tokens for _ in range(2))
    assert first == second


@pytest.mark.parametrize("one", ["abc", (1, 66, 67, 68)])
def test_one_prompt_is_one_prompt(engine, one):
    (alone,) = engine.generate(one, max_new_tokens=3)
    (listed,) = engine.generate([one], max_new_tokens=3)
    assert alone.tokens == listed.tokens
    assert len(engine.requests(one, max_new_tokens=3)) == 1
    assert engine.generate([], max_new_tokens=3) == []


@pytest.mark.parametrize("prompts", [b"abc", 5, {"a": 1}, None])
def test_what_is_no_prompt(engine, prompts):
    with pytest.raises(UserError, match=r"^prompts must be a list of texts or of lists of token ids, not "):
        engine.generate(prompts, max_new_tokens=3)
