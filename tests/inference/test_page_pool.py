"""Every page has one owner, and an engine with few pages answers like one with many."""

import dataclasses
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import finish, make_engine

from looplm_jax.errors import UserError
from looplm_jax.halting import QExit
from looplm_jax.inference import EngineConfig, Finish, Request, Sampling
from looplm_jax.inference._cache_layout import PagePool, PoolSize

PAGES = 9
events = st.lists(st.sampled_from([("release", 0), *(("reserve", count) for count in range(6))]))


@given(events)
def test_no_page_has_two_owners_and_all_come_back(events):
    """The oldest owner returns its pages; the pages that were free for the longest time are used next."""
    pool, owners, freed = PagePool(PAGES), [], list(range(PAGES))
    for event, count in events:
        if event == "release" and owners:
            freed += owners[0]
            pool.release(owners.pop(0))
        elif event == "reserve" and count > len(freed):
            with pytest.raises(OverflowError, match=f"{count} pages are wanted and {len(freed)} are free"):
                pool.reserve(count)
        elif event == "reserve":
            owners.append(pool.reserve(count))
            assert list(owners[-1]) == freed[:count]
            freed = freed[count:]
        held = [page for pages in owners for page in pages]
        assert len(set(held)) == len(held)
        assert pool.free + len(held) == PAGES
    for pages in owners:
        pool.release(pages)
    assert sorted(pool.reserve(PAGES)) == list(range(PAGES))


@pytest.mark.parametrize("pages", [(3,), (0, 0), (0, 7)])
def test_pages_that_nobody_has_are_not_taken_back(pages):
    pool = PagePool(PAGES)
    assert pool.reserve(3) == (0, 1, 2)
    with pytest.raises(ValueError, match="some are not reserved"):
        pool.release(pages)
    assert pool.free == PAGES - 3


@given(st.integers(1, 9), st.integers(1, 500), st.integers(1, 200))
def test_by_default_every_slot_can_have_the_longest_request(slots, capacity, page_size):
    size = PoolSize.of(slots=slots, capacity=capacity, page_size=page_size)
    assert size.page_size == min(page_size, capacity)
    assert size.pages == slots * size.pages_per_slot == slots * size.needed(capacity)
    assert capacity <= size.pages_per_slot * size.page_size < capacity + size.page_size


REQUESTS = [
    Request(prompt_ids=(1,), max_new_tokens=6, policy=QExit(q=0.5)),
    Request(prompt_ids=tuple(range(40)), max_new_tokens=4, sampling=Sampling(temperature=0.7, seed=3)),
    Request(prompt_ids=tuple(range(60, 3, -1)), max_new_tokens=30, policy=QExit(q=0.8)),
    Request(prompt_ids=(7, 7), max_new_tokens=20, policy=QExit(q=0.9), sampling=Sampling(temperature=1.0, seed=5)),
]


@functools.cache
def many_pages():
    """Returns an engine with room for everything, in pages of another size."""
    return make_engine()


@pytest.fixture(scope="module")
def alone():
    """Returns the answer to each request when it runs alone with all pages."""
    engine = many_pages()
    return [finish(engine, [engine.submit(request)])[0] for request in REQUESTS]


@functools.cache
def few_pages():
    """Returns an engine whose three slots share 144 positions; one request may use 128."""
    return make_engine(page_size=16, pages=PAGES)


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(0, len(REQUESTS) - 1), st.integers(0, 9)), min_size=4, max_size=12), st.data())
def test_pages_change_no_answer(alone, chosen, data):
    """For any pages that a request gets: other requests arrive, are cancelled and finish."""
    engine, handles = few_pages(), []
    for number, steps in chosen:
        handles.append(engine.submit(REQUESTS[number]))
        for _ in range(steps):
            engine.step()
        if data.draw(st.booleans()):
            data.draw(st.sampled_from(handles)).cancel()
    for (number, _), result in zip(chosen, finish(engine, handles)):
        assert result.finish in (Finish.CANCELLED, alone[number].finish)
        assert result.tokens == alone[number].tokens[: len(result.tokens)]
        assert result.log_probs == pytest.approx(alone[number].log_probs[: len(result.tokens)], abs=1e-5)
    assert engine._decoder._pool.free == PAGES


def test_a_kept_cache_is_read_into_other_pages(alone):
    """These pages contain other tokens by then."""
    engine, whole = few_pages(), REQUESTS[2]
    first = dataclasses.replace(whole, max_new_tokens=12, keep_cache=True)
    (begun,) = finish(engine, [engine.submit(first)])
    finish(engine, [engine.submit(request) for request in REQUESTS])
    rest = dataclasses.replace(whole, prompt_ids=begun.tokens[-1:], max_new_tokens=18, past=begun.cache)
    (ended,) = finish(engine, [engine.submit(rest)])
    (expected,) = finish(many_pages(), [many_pages().submit(rest)])
    assert begun.tokens == alone[2].tokens[:12]
    assert ended.tokens == expected.tokens
    assert ended.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
    assert engine._decoder._pool.free == PAGES


def test_a_request_that_waits_for_pages_is_overtaken_by_none():
    """Even if there is a free slot, and enough pages for smaller requests after it."""
    engine, begun = few_pages(), []

    def request(name, tokens):
        return Request(prompt_ids=(5,), max_new_tokens=tokens, on_token=lambda _: begun.append(name))

    wanted = [("first", 60), ("large", 100), ("small", 3), ("small", 3)]
    handles = [engine.submit(request(*each)) for each in wanted]
    results = finish(engine, handles)
    assert [len(result.tokens) for result in results] == [tokens for _, tokens in wanted]
    assert list(dict.fromkeys(begun)) == ["first", "large", "small"]


def test_a_cancelled_request_keeps_nobody_waiting_for_pages(alone):
    engine = few_pages()
    large = Request(prompt_ids=(5,), max_new_tokens=100)
    handles = [engine.submit(large), engine.submit(large), engine.submit(REQUESTS[0])]
    for _ in range(5):
        engine.step()
    assert not handles[2].done
    handles[1].cancel()
    while not handles[2].done:
        engine.step()
    assert not handles[0].done
    assert handles[2].result().tokens == alone[0].tokens
    handles[0].cancel()
    finish(engine, [])
    assert engine._decoder._pool.free == PAGES


def test_a_request_that_the_pool_can_never_hold_is_refused():
    engine = make_engine(page_size=16, pages=5)
    message = (
        "60 tokens of prompt and 50 new ones take 7 pages of 16 tokens, and the cache has 5: 2 are missing; "
        "use EngineConfig(pages=7)"
    )
    with pytest.raises(UserError) as caught:
        engine.submit(Request(prompt_ids=(1,) * 60, max_new_tokens=50))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["pages", "page_size"])
def test_sizes_of_the_pool_that_cannot_be(name):
    with pytest.raises(UserError, match=f"^{name} must be at least 1, not 0$"):
        EngineConfig(**{name: 0})
    with pytest.raises(UserError, match=f"^{name} must be a whole number, not 1.5$"):
        EngineConfig(**{name: 1.5})
