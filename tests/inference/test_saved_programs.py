"""A process that finds saved programs traces nothing, and gives the same answers."""

import jax
import pytest
from serving_models import finish, make_engine

from looplm_jax.halting import Custom, FixedLoops, QExit
from looplm_jax.halting.signals import Needs
from looplm_jax.inference import Finish, Request, Sampling, _saved_programs

REQUESTS = [
    Request(prompt_ids=(1, 2, 3), max_new_tokens=5, policy=QExit(q=0.5)),
    Request(prompt_ids=(4,), max_new_tokens=4, policy=FixedLoops(loops=2), sampling=Sampling(temperature=1.0, seed=3)),
]


def answers(folder=None, requests=REQUESTS, **size):
    engine = make_engine(programs=folder, **size)
    results = finish(engine, [engine.submit(request) for request in requests])
    return [(result.finish, result.tokens, result.exit_loops, result.log_probs) for result in results]


def never(*_, **__):
    raise AssertionError("a program was traced")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "traced"
    assert answers(folder) == answers()
    return folder


def test_saved_programs_are_not_traced_again(folder, monkeypatch):
    assert len(list(folder.iterdir())) == 2
    expected = answers()
    monkeypatch.setattr(_saved_programs.jax.export, "export", never)
    assert answers(folder) == expected


def test_only_the_owner_can_write_to_the_folder(folder):
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("size", [{"previews": True}, {"ticks": 2}, {"slots": 2}])
def test_another_engine_has_programs_of_its_own(folder, monkeypatch, size):
    monkeypatch.setattr(_saved_programs.jax.export, "export", never)
    assert {answer[0] for answer in answers(folder, **size)} == {Finish.FAILED}


def test_other_sources_have_programs_of_their_own(folder, monkeypatch):
    monkeypatch.setattr(_saved_programs, "_versions", lambda: "another version")
    monkeypatch.setattr(_saved_programs.jax.export, "export", never)
    assert {answer[0] for answer in answers(folder)} == {Finish.FAILED}


def test_the_slots_are_donated(folder):
    engine = make_engine(programs=folder)
    handle = engine.submit(REQUESTS[0])
    engine.step()
    before = jax.tree.leaves(engine._decoder._slots.cache.planes)
    engine._decoder.tick()
    assert all(leaf.is_deleted() for leaf in before)
    handle.cancel()


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:1000], lambda data: data[:-9] + b"x" + data[-8:]]
)
def test_a_damaged_program_is_traced_and_saved_again(folder, tmp_path, monkeypatch, damage):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(damage(path.read_bytes()))
    expected = answers(folder)
    assert answers(tmp_path) == expected
    monkeypatch.setattr(_saved_programs.jax.export, "export", never)
    assert answers(tmp_path) == expected


def test_a_folder_that_cannot_be_made_costs_time_only(folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert answers(tmp_path / "file" / "traced") == answers(folder)


def test_a_policy_with_a_function_is_not_saved(tmp_path):
    policy = Custom(lambda loops, *_: loops >= 2, needs=Needs(0))
    answers(tmp_path, [Request(prompt_ids=(1,), max_new_tokens=2, policy=policy)])
    assert list(tmp_path.iterdir()) == []


def test_the_programs_used_least_recently_are_removed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(_saved_programs, "_MOST_PROGRAMS", 1)
    answers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
