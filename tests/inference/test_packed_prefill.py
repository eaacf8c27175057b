"""Prompts that one program reads together: each is answered as it is alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import finish, make_engine

from looplm_jax.halting import QExit
from looplm_jax.inference import Request, Sampling
from looplm_jax.inference._packed_prefill import admit_pack, make_pack
from looplm_jax.inference._prefill import admit, prefill_chunk

SHORT = [
    Request(prompt_ids=(1, 2, 3), max_new_tokens=5, policy=QExit(q=0.5)),
    Request(prompt_ids=(9,), max_new_tokens=4, policy=QExit(q=0.9), sampling=Sampling(temperature=1.0, seed=7)),
    Request(prompt_ids=tuple(range(20, 31)), max_new_tokens=6, sampling=Sampling(temperature=0.8, top_k=9, seed=2)),
    Request(prompt_ids=tuple(range(40, 56)), max_new_tokens=3),  # as long as a chunk
]
LONG = Request(prompt_ids=tuple(range(30)), max_new_tokens=4)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def alone(engine):
    return {request: finish(engine, [engine.submit(request)])[0] for request in [*SHORT, LONG]}


@settings(max_examples=10)
@given(st.lists(st.sampled_from([*SHORT, LONG]), min_size=2, max_size=9))
def test_prompts_that_are_read_together_are_answered_as_alone(engine, alone, requests):
    results = finish(engine, [engine.submit(request) for request in requests])
    for request, result in zip(requests, results):
        assert (result.tokens, result.exit_loops) == (alone[request].tokens, alone[request].exit_loops)
        np.testing.assert_allclose(result.log_probs, alone[request].log_probs, atol=1e-5)


def test_one_program_reads_all_that_waits(engine, alone, monkeypatch):
    """A pack has, in their order, as many prompts as fit a chunk and have a slot.

    The engine has three slots, and fetches the tokens of a pack, which free its slots, after the next pack began.
    """
    packs, whole = [], engine._decoder.admit_pack

    def noted(readings):
        packs.append([len(reading.left) for reading in readings.values()])
        return whole(readings)

    monkeypatch.setattr(engine._decoder, "admit_pack", noted)
    handles = [engine.submit(Request(prompt_ids=(1,) * count, max_new_tokens=1)) for count in (7, 9, 1, 10, 2, 3, 16)]
    before = [program._cache_size() for program in (admit_pack, prefill_chunk, admit)]
    finish(engine, handles)
    assert packs == [[7, 9], [1], [10, 2], [3], [16]]
    assert [program._cache_size() for program in (admit_pack, prefill_chunk, admit)] == before


def test_a_policy_that_fails_ends_its_own_request_only(engine, alone):
    class Broken(QExit):
        def exits(self, signals):
            raise RuntimeError("no")

    broken = Request(prompt_ids=(4, 5), max_new_tokens=2, policy=Broken(q=0.5))
    first, failed, last = finish(engine, [engine.submit(each) for each in (SHORT[0], broken, SHORT[1])])
    assert "the exit policy raised RuntimeError: no" in failed.error
    assert (first.tokens, last.tokens) == (alone[SHORT[0]].tokens, alone[SHORT[1]].tokens)
    assert engine._decoder._pool.free == engine.config.pool.pages


@given(st.dictionaries(st.integers(0, 4), st.lists(st.integers(1, 96), min_size=1, max_size=6), max_size=5))
def test_a_pack_has_every_token_of_its_prompts(prompts):
    pack = make_pack(prompts, slots=5, size=30, pages=None, settings=None, seen_tokens=None)
    for slot in range(5):
        (own,) = np.nonzero(pack.owners == slot)
        assert pack.tokens[own].tolist() == prompts.get(slot, [])
        assert pack.positions[own].tolist() == list(range(len(own)))
        assert pack.lengths[slot] == len(own)
        assert not len(own) or pack.ends[slot] == own[-1]
    assert np.count_nonzero(pack.owners < 5) == sum(map(len, prompts.values()))
