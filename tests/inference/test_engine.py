import asyncio
import dataclasses
import itertools
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import CONFIG, LOOPS, Letters, finish, make_engine, small_model

from looplm_jax.config import MeshConfig
from looplm_jax.halting import ArgmaxStable, Bounded, FixedLoops, QExit
from looplm_jax.inference import Engine, Finish, Request, Sampling, bytes_per_token
from looplm_jax.inference import _scheduler as scheduler_module
from looplm_jax.inference._packed_prefill import admit_pack
from looplm_jax.inference._prefill import admit, prefill_chunk
from looplm_jax.inference._tick import run_ticks
from looplm_jax.models._looplm import boxed_shapes
from looplm_jax.sharding import abstract_arrays, make_mesh

PROMPT = (3, 14, 15, 92, 65, 35)
REQUESTS = [
    Request(prompt_ids=(1,), max_new_tokens=6, policy=QExit(q=0.5)),
    Request(prompt_ids=PROMPT, max_new_tokens=9, policy=QExit(q=0.3), sampling=Sampling(temperature=1.0, seed=1)),
    Request(prompt_ids=PROMPT, max_new_tokens=9, policy=QExit(q=0.3), sampling=Sampling(temperature=1.0, seed=2)),
    Request(prompt_ids=tuple(range(40)), max_new_tokens=4, sampling=Sampling(temperature=0.7, top_k=5, top_p=0.9)),
    Request(prompt_ids=tuple(range(20, 3, -1)), max_new_tokens=1, policy=FixedLoops(loops=1)),
    Request(prompt_ids=(7, 7), max_new_tokens=12, policy=Bounded(QExit(q=0.9), min_loops=2), loops_per_token=2.5),
    Request(prompt_ids=(50, 60, 70), max_new_tokens=8, policy=FixedLoops(loops=2), stop_ids=(4, 5, 6)),
]


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def alone(engine):
    """What each request is answered when it has the engine for itself."""
    return [finish(engine, [engine.submit(request)])[0] for request in REQUESTS]


def assert_same(result, expected, atol=1e-5):
    assert (result.tokens, result.exit_loops) == (expected.tokens, expected.exit_loops)
    np.testing.assert_allclose(result.log_probs, expected.log_probs, atol=atol)
    assert (result.text, result.finish) == (expected.text, expected.finish)


@settings(max_examples=8)
@given(st.lists(st.integers(0, len(REQUESTS) - 1), min_size=2, max_size=10), st.integers(0, 20))
def test_a_request_is_answered_the_same_alone_and_in_any_company(engine, alone, chosen, pause):
    """In any order, with any neighbours, and whenever it comes."""
    handles = [engine.submit(REQUESTS[number]) for number in chosen[1:]]
    for _ in range(pause):
        engine.step()
    handles = [engine.submit(REQUESTS[chosen[0]]), *handles]
    for number, result in zip(chosen, finish(engine, handles)):
        assert_same(result, alone[number])


def test_other_requests_compile_nothing(engine, alone):
    programs = (prefill_chunk, admit, admit_pack, run_ticks)
    before = [program._cache_size() for program in programs]
    for number, policy in enumerate([QExit(q=0.123), FixedLoops(loops=1), Bounded(QExit(q=0.9), max_loops=2), None]):
        sampling = Sampling(temperature=number / 2, top_k=number, min_p=0.01, seed=number)
        prompt = list(range(1, 2 + 17 * number))
        engine.generate([prompt], max_new_tokens=number + 2, policy=policy, sampling=sampling, stop_ids=(number,))
    assert [program._cache_size() for program in programs] == before


def test_an_array_for_each_layer_changes_no_answer(alone):
    other = make_engine(unroll=True)
    results = finish(other, [other.submit(request) for request in REQUESTS])
    for result, expected in zip(results, alone):
        assert_same(result, expected, atol=1e-4)


def test_three_ticks_at_a_time_and_previews_change_no_answer(alone):
    """And a preview is what each loop would have said: that of the last loop is the token, where nothing is drawn."""
    other = make_engine(ticks=3, previews=True)
    given_out = [[] for _ in REQUESTS]
    handles = [
        other.submit(dataclasses.replace(request, on_token=tokens.append))
        for request, tokens in zip(REQUESTS, given_out)
    ]
    for result, expected in zip(finish(other, handles), alone):
        assert_same(result, expected)
    for request, expected, (first, *rest) in zip(REQUESTS, alone, given_out):
        assert first.previews == ()  # of a prompt all loops are there at once
        assert tuple(len(new.previews) for new in rest) == expected.exit_loops[1:]
        if request.sampling.temperature == 0:
            assert tuple(new.previews[-1] for new in rest) == expected.tokens[1:]


@pytest.mark.slow
def test_keys_and_values_spread_over_a_mesh_change_no_answer(alone):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2))
    sharded = Engine(*small_model(), Letters(), config=CONFIG, mesh=mesh)
    keys = sharded._decoder._slots.cache.planes.core.keys
    assert len(keys.sharding.device_set) == 2
    assert keys.addressable_shards[0].data.shape[4] * 2 == keys.shape[4]
    results = finish(sharded, [sharded.submit(request) for request in REQUESTS])
    for result, expected in zip(results, alone):
        assert_same(result, expected, atol=1e-4)


@pytest.mark.slow
def test_parameters_spread_as_in_training_change_no_answer(alone):
    """Over data, width and heads at once; rows need not divide over them."""
    model, params = small_model()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    wanted = abstract_arrays(boxed_shapes(model.config), mesh)
    spread = jax.tree.map(lambda leaf, like: jax.device_put(np.asarray(leaf), like.sharding), params, wanted)
    assert spread["embedding"].addressable_shards[0].data.shape == (48, model.config.width // 2)
    sharded = Engine(model, spread, Letters(), config=CONFIG, mesh=mesh)
    programs = (prefill_chunk, admit, admit_pack, run_ticks)
    before = [program._cache_size() for program in programs]
    results = finish(sharded, [sharded.submit(request) for request in REQUESTS])
    for result, expected in zip(results, alone, strict=True):
        assert_same(result, expected, atol=1e-4)
    assert [program._cache_size() for program in programs] == [size + 1 for size in before]  # nothing moves about


@pytest.mark.slow
def test_a_bfloat16_cache_is_half_the_size_and_nearly_as_good(engine, alone):
    half = make_engine(cache_dtype=jax.numpy.bfloat16)
    assert half.cache_bytes * 2 == engine.cache_bytes
    config = small_model()[0].config
    a_token = bytes_per_token(config, CONFIG.cache, loops=LOOPS, dtype=jax.numpy.float32)
    assert engine.cache_bytes == CONFIG.slots * CONFIG.capacity * a_token
    greedy = [0, 4]
    results = finish(half, [half.submit(REQUESTS[number]) for number in greedy])
    for number, result in zip(greedy, results):
        np.testing.assert_allclose(result.log_probs[:3], alone[number].log_probs[:3], atol=0.05)


def test_what_no_slot_knew_is_made_room_for_while_others_are_under_way(engine, alone):
    """A policy of a new kind and a repetition penalty come while neighbours are in the middle of their text."""
    fresh = make_engine()
    handles = [fresh.submit(REQUESTS[number]) for number in (5, 1)]
    for _ in range(8):
        fresh.step()
    prompt = (8, 9)
    penalized = Request(
        prompt_ids=prompt,
        max_new_tokens=20,
        policy=ArgmaxStable(times=1),
        sampling=Sampling(repetition_penalty=1e6),
        keep_cache=True,
    )
    handles.append(fresh.submit(penalized))
    *others, last = finish(fresh, handles)
    for number, result in zip((5, 1), others):
        assert_same(result, alone[number], atol=1e-4)
    assert len({*prompt, *last.tokens}) == len(prompt) + 20
    assert min(last.exit_loops) >= 2
    (more,) = finish(
        fresh, [fresh.submit(dataclasses.replace(penalized, prompt_ids=last.tokens[-1:], past=last.cache))]
    )
    assert len({*prompt, *last.tokens, *more.tokens}) == len(prompt) + 40  # what the prefix cache holds counts, too


def test_few_loops_are_wasted_while_requests_wait(engine):
    """Passes times slots against the loops that tokens took."""
    busy = make_engine()
    policies = [QExit(q=0.3), FixedLoops(loops=3), QExit(q=0.8)]
    handles = [
        busy.submit(Request(prompt_ids=(1 + number,), max_new_tokens=30, policy=policies[number % 3]))
        for number in range(15)
    ]
    while len(busy._scheduler._queue):
        busy.step()
    assert busy.stats.loops / (busy.stats.ticks * CONFIG.slots) >= 0.95
    results = finish(busy, handles)
    assert busy.stats.tokens == sum(len(result.tokens) for result in results) == 15 * 30
    assert busy.stats.loops == sum(sum(result.exit_loops[1:]) for result in results)
    assert busy.stats.prompt_tokens == 15


def test_clients_take_turns(engine):
    """The one request of a client that comes last is begun before the second of a client with many."""
    begun = []

    def request(client):
        return Request(prompt_ids=(5,), max_new_tokens=1, client=client, on_token=lambda _: begun.append(client))

    handles = [engine.submit(request("busy")) for _ in range(6)]
    handles.append(engine.submit(request("late")))
    finish(engine, handles)
    assert begun == ["busy", "late", *["busy"] * 5]


def test_a_kept_cache_holds_the_tokens_of_the_result_only(engine):
    """Though the slot has gone on before its text was seen to end."""
    (whole,) = engine.generate(["abc"], max_new_tokens=10)
    (cut,) = engine.generate(["abc"], max_new_tokens=10, stop_strings=(whole.text[3],), keep_cache=True)
    assert len(cut.tokens) == 4
    assert cut.cache.lengths.tolist() == [len(cut.prompt_ids) + len(cut.tokens) - 1]
    (rest,) = engine.generate([cut.tokens[-1:]], max_new_tokens=6, past=cut.cache)
    assert rest.tokens == whole.tokens[4:]


def test_a_budget_of_loops_is_kept_after_every_token(engine):
    for budget in (1.0, 1.5, 2.2):
        (result,) = engine.generate([(9, 9)], max_new_tokens=12, loops_per_token=budget)
        spent = np.cumsum(result.exit_loops[1:])
        assert (spent <= budget * np.arange(1, 12)).all()
        assert spent[-1] > budget * 11 - 1


def test_requests_make_only_explicit_transfers(engine, alone):
    """Once their programs are compiled: short and long prompts, and one that continues a prefix cache."""

    def serve():
        cancelled = engine.submit(REQUESTS[2])
        handles = [engine.submit(request) for request in REQUESTS]
        kept = engine.submit(dataclasses.replace(REQUESTS[0], keep_cache=True))
        engine.step()
        cancelled.cancel()
        *results, first = finish(engine, [*handles, kept])
        more = dataclasses.replace(REQUESTS[1], prompt_ids=first.tokens[-1:], past=first.cache)
        return *results, *finish(engine, [engine.submit(more)])

    *_, continued = serve()
    with jax.transfer_guard("disallow"):
        results = serve()
    for result, expected in zip(results, [*alone, continued], strict=True):
        assert_same(result, expected)


def test_a_budget_of_time_gives_up_loops(engine, monkeypatch):
    """With a clock by which a tick takes 10 ms, 20 ms are two loops."""
    clock = types.SimpleNamespace(monotonic=itertools.count(0.0, 0.01).__next__)
    monkeypatch.setattr(scheduler_module, "time", clock)
    fresh = make_engine()
    (free,) = fresh.generate([(9, 9)], max_new_tokens=12)
    (result,) = fresh.generate([(9, 9)], max_new_tokens=12, milliseconds_per_token=20)
    assert set(free.exit_loops) == {LOOPS}
    assert np.mean(result.exit_loops[3:]) <= 2.25


def test_stop_strings_end_the_text_before_them(engine):
    (whole,) = engine.generate(["abc"], max_new_tokens=10)
    stop = whole.text[3:5]
    (cut,) = engine.generate(["abc"], max_new_tokens=10, stop_strings=(stop,))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish is Finish.STOP
    assert whole.finish is Finish.LENGTH


def test_a_stream_gives_the_tokens_of_the_result(engine, alone):
    streamed = list(engine.stream((1,), max_new_tokens=6, policy=QExit(q=0.5)))
    assert tuple(new.token for new in streamed) == alone[0].tokens
    assert tuple(new.exit_loop for new in streamed) == alone[0].exit_loops
    assert "".join(new.text for new in streamed) == alone[0].text


def test_more_prompts_than_the_queue_holds(alone):
    short = make_engine(queue=1)
    results = short.generate([(1,)] * 5, max_new_tokens=6, policy=QExit(q=0.5))
    assert [result.tokens for result in results] == [alone[0].tokens] * 5


def test_a_thread_serves_those_who_wait_and_those_who_await(engine, alone):
    async def both():
        streamed = [new.token async for new in engine.submit(REQUESTS[1])]
        return streamed, await engine.submit(REQUESTS[0])

    with engine.serving():
        handles = [engine.submit(request) for request in REQUESTS]
        streamed, awaited = asyncio.run(both())
        results = [handle.result(timeout=60) for handle in handles]
        received = [new.token for new in handles[0].tokens()]
    for result, expected in zip([*results, awaited], [*alone, alone[0]]):
        assert_same(result, expected)
    assert tuple(streamed) == alone[1].tokens
    assert tuple(received) == alone[0].tokens


def test_what_is_unfinished_when_serving_ends_is_cancelled(engine, alone):
    with engine.serving():
        handles = [engine.submit(Request(prompt_ids=(1,), max_new_tokens=100)) for _ in range(7)]
    assert {handle.result(timeout=0).finish for handle in handles} <= {Finish.CANCELLED, Finish.LENGTH}
    assert_same(finish(engine, [engine.submit(REQUESTS[0])])[0], alone[0])


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_nothing_grows_with_the_number_of_requests(count):
    small = make_engine(queue=50)
    few = Request(prompt_ids=(3,), max_new_tokens=2, policy=FixedLoops(loops=1))
    small.generate([few.prompt_ids] * 10, max_new_tokens=2, policy=few.policy)
    before, answered = len(jax.live_arrays()), 0
    for start in range(0, count, 50):
        handles = [
            small.submit(dataclasses.replace(few, client=str(start + number), max_new_tokens=1 + number % 2))
            for number in range(50)
        ]
        answered += sum(len(result.tokens) == 1 + number % 2 for number, result in enumerate(finish(small, handles)))
        del handles
    assert answered == count
    assert len(jax.live_arrays()) <= before + 2
    scheduler = small._scheduler
    assert (len(scheduler._queue), len(scheduler._queue._waiting)) == (0, 0)
    assert (len(scheduler._in_flight), scheduler._prefill) == (0, None)
    assert not any(scheduler._slots)
