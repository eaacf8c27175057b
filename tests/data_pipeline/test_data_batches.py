import collections
import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import make_texts, write_jsonl

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.data import Example, open_corpus, train_batches, training_texts, validation_batches
from looplm_jax.data._documents import is_validation
from looplm_jax.data._examples import chunks, document_example
from looplm_jax.data._pipeline import mixture
from looplm_jax.data.tokenizers import train_sentencepiece
from looplm_jax.errors import UserError
from looplm_jax.testing import assert_resumes_exactly

GEOMETRY = {"batch_size": 4, "sequence_length": 32}


@pytest.fixture
def stream(text_data, tokenizer):
    """Returns a function that opens training streams, which are closed at the end of the test."""
    opened = []

    def make(data=text_data, tokenizer=tokenizer, seed=0, **geometry):
        opened.append(train_batches(data, tokenizer, seed=seed, **{**GEOMETRY, **geometry}))
        return opened[-1]

    yield make
    for iterator in opened:
        iterator.close()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(a, b):
    return all(
        np.array_equal(getattr(x, field.name), getattr(y, field.name))
        for x, y in zip(a, b, strict=True)
        for field in dataclasses.fields(x)
    )


def segments(batches):
    """Yields (tokens, targets, positions, mask) of every segment."""
    for batch in batches:
        for row in range(len(batch.tokens)):
            for number in range(1, batch.segment_ids[row].max() + 1):
                at = batch.segment_ids[row] == number
                yield batch.tokens[row][at], batch.targets[row][at], batch.positions[row][at], batch.loss_mask[row][at]


def test_chunks_lose_no_target():
    example = Example.of(range(20), [False] * 5 + [True] * 15)
    pieces = chunks(example, 6)
    assert [len(piece["tokens"]) for piece in pieces] == [6, 6, 6, 1]
    for name, expected in (("tokens", range(19)), ("targets", range(1, 20)), ("loss_mask", [0] * 4 + [1] * 15)):
        assert np.concatenate([piece[name] for piece in pieces]).tolist() == list(expected)
    assert chunks(Example.of([3], [False]), 6) == []


def test_document_has_both_ends(tokenizer):
    example = document_example("loop", tokenizer)
    assert example.tokens.tolist() == [0, *tokenizer.encode("loop"), 0]
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_batches_are_well_formed(stream):
    for batch in take(stream(), 20):
        assert {getattr(batch, field.name).shape for field in dataclasses.fields(batch)} == {(4, 32)}
        assert [getattr(batch, field.name).dtype for field in dataclasses.fields(batch)] == [np.int32] * 4 + [
            np.float32
        ]
        padding = batch.segment_ids == 0
        assert not batch.loss_mask[padding].any()
        assert batch.loss_mask[~padding].all()


def test_targets_follow_tokens_and_positions_restart(stream):
    for tokens, targets, positions, _ in segments(take(stream(), 20)):
        assert positions.tolist() == list(range(len(tokens)))
        assert tokens[1:].tolist() == targets[:-1].tolist()


def test_an_epoch_holds_every_training_document_once_and_none_held_out(tmp_path, stream, tokenizer):
    texts = make_texts(60)
    path = str(write_jsonl(tmp_path / "a.jsonl", texts))
    data = DataConfig(sources=(SourceConfig(path=path),), validation_fraction=0.2)
    expected = collections.Counter(text for text in texts if not is_validation(text, 0.2))
    assert len(expected) < 60
    seen = list(training_texts(data))
    assert collections.Counter(seen) == expected
    assert seen != list(expected)
    found = {tokenizer.decode(targets) for _, targets, *_ in segments(take(stream(data, sequence_length=256), 40))}
    assert found == set(expected)


def test_rows_are_mostly_used(stream):
    used = np.mean([batch.segment_ids > 0 for batch in take(stream(sequence_length=128), 30)])
    assert used > 0.9


def test_mixture_by_weight(text_data):
    corpus = open_corpus(text_data)
    records = mixture(corpus, 0)
    first = corpus.texts[0].source
    texts_of_first = {first[index] for index in range(len(first))}
    counts = collections.Counter(records[index] in texts_of_first for index in range(300))
    assert counts == {True: 200, False: 100}


def test_every_epoch_has_its_own_order(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", make_texts(30)))
    records = mixture(open_corpus(DataConfig(sources=(SourceConfig(path=path),), validation_fraction=0)), 0)
    first, second = ([records[index] for index in range(start, start + 30)] for start in (0, 30))
    assert sorted(first) == sorted(second)
    assert first != second


def test_processes_share_the_documents(text_data):
    corpus = open_corpus(text_data)
    whole = mixture(corpus, 0)
    shares = [mixture(corpus, 0, index, 2) for index in range(2)]
    both = [share[index] for share in shares for index in range(60)]
    assert collections.Counter(both) == collections.Counter(whole[index] for index in range(120))


def test_process_holds_its_rows(stream):
    shares = [stream(process_index=index, process_count=2) for index in range(2)]
    ours, theirs = (take(share, 5) for share in shares)
    assert ours[0].tokens.shape == (2, 32)
    assert not same(ours, theirs)


def test_seed_fixes_the_order(stream):
    assert same(take(stream(), 10), list(itertools.islice(stream(), 10)))
    assert not same(take(stream(), 10), take(stream(seed=1), 10))


@pytest.mark.parametrize(
    "geometry", [{}, {"batch_size": 3, "sequence_length": 17}, {"process_index": 1, "process_count": 2}]
)
@pytest.mark.parametrize("batches", [1, 17, *(pytest.param(count, marks=pytest.mark.slow) for count in (0, 7, 16, 40))])
def test_resume_is_exact(stream, batches, geometry):
    assert_resumes_exactly(lambda: stream(**geometry), done=batches, more=25)


def test_state_is_small(stream):
    iterator = stream()
    take(iterator, 3)
    assert len(json.dumps(iterator.state())) < 2_000


def test_state_of_another_stream_is_refused(stream, text_data):
    state = stream().state()
    others = {
        "data.seed: 0 then, 5 now": stream(dataclasses.replace(text_data, seed=5)),
        "batch_size: 4 then, 8 now": stream(batch_size=8),
        "sequence_length: 32 then, 64 now": stream(sequence_length=64),
        "process_count: 1 then, 2 now": stream(process_count=2),
        "seed: 0 then, 3 now": stream(seed=3),
        "data.validation_fraction: 0.1 then, 0.2 now": stream(dataclasses.replace(text_data, validation_fraction=0.2)),
        "tokenizer: '.*' then, '.*' now": stream(tokenizer=train_sentencepiece(make_texts(90), 310)),
    }
    for message, iterator in others.items():
        with pytest.raises(UserError, match=message):
            iterator.restore(state)


def test_the_place_in_data_that_was_moved_is_taken_up_exactly(stream, tmp_path):
    (tmp_path / "before").mkdir()
    write_jsonl(tmp_path / "before" / "a.jsonl", make_texts(80))
    data = DataConfig(root=str(tmp_path / "before"), sources=(SourceConfig(path="*.jsonl"),), validation_fraction=0)
    original = stream(data)
    take(original, 7)
    state, expected = original.state(), take(original, 5)
    state["identity"]["data.root"] = data.root  # as saved by versions that compared it
    (tmp_path / "before").rename(tmp_path / "after[1]?")
    moved = dataclasses.replace(data, root=str(tmp_path / "after[1]?"))
    resumed = stream(moved)
    resumed.restore(state)
    assert same(take(resumed, 5), expected)
    write_jsonl(tmp_path / "after[1]?" / "a.jsonl", [*make_texts(79), "another text"])
    with pytest.raises(UserError, match=r"content: '.*' then, '.*' now"):
        stream(moved).restore(state)


def test_validation_is_the_same_for_any_number_of_processes(text_data, tokenizer):
    whole = validation_batches(text_data, tokenizer, **GEOMETRY)
    parts = [validation_batches(text_data, tokenizer, process_index=p, process_count=2, **GEOMETRY) for p in range(2)]
    assert {part.num_sequences for part in parts} == {whole.num_sequences}
    for batch, *shares in zip(whole, *parts, strict=True):
        for field in dataclasses.fields(batch):
            joined = np.concatenate([getattr(share, field.name) for share in shares])
            np.testing.assert_array_equal(joined, getattr(batch, field.name))


def test_validation_holds_every_held_out_document(text_data, tokenizer):
    batches = validation_batches(text_data, tokenizer, batch_size=4, sequence_length=256)
    found = sorted(tokenizer.decode(targets) for _, targets, *_ in segments(batches))
    assert found == sorted(text for text in make_texts(120) if is_validation(text, 0.1))
    assert same(batches, validation_batches(open_corpus(text_data), tokenizer, batch_size=4, sequence_length=256))


def test_last_validation_batch_is_padded(text_data, tokenizer):
    batches = validation_batches(text_data, tokenizer, batch_size=4, sequence_length=32, max_sequences=6)
    assert (batches.num_sequences, len(batches)) == (6, 2)
    last = batches.batches[-1]
    assert last.tokens.shape == (4, 32)
    assert last.segment_ids[1].any()
    assert not last.segment_ids[2:].any()
    assert not last.loss_mask[2:].any()


def test_first_validation_sequences_hold_some_of_every_source(tmp_path, tokenizer):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in make_texts(100)])
    sources = tuple(SourceConfig(path=str(tmp_path / f"{name}.jsonl")) for name in "ab")
    data = DataConfig(sources=sources, validation_fraction=0.5)
    batches = validation_batches(data, tokenizer, batch_size=8, sequence_length=64, max_sequences=8)
    starts = collections.Counter(tokenizer.decode(targets)[:1] for _, targets, *_ in segments(batches))
    assert starts["a"] > 2
    assert starts["b"] > 2


def test_nothing_held_out(text_data, tokenizer):
    with pytest.raises(UserError, match=r"no document is held out at data.validation_fraction=0.0; raise it"):
        validation_batches(dataclasses.replace(text_data, validation_fraction=0.0), tokenizer, **GEOMETRY)


def test_batch_must_be_shared(text_data, tokenizer):
    with pytest.raises(UserError, match="batch_size=4 cannot be shared by 3 processes; make it a multiple of 3"):
        train_batches(text_data, tokenizer, seed=0, process_count=3, **GEOMETRY)


def test_sequence_length_is_checked(text_data, tokenizer):
    with pytest.raises(UserError, match="sequence_length must be at least 1, not 0"):
        train_batches(text_data, tokenizer, seed=0, batch_size=1, sequence_length=0)


def test_error_in_a_reading_thread_reaches_the_caller(tmp_path, stream):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    iterator = stream(DataConfig(sources=(SourceConfig(path=str(path)),), validation_fraction=0.0))
    path.unlink()
    with pytest.raises(UserError, match=r"a.jsonl: there is no such file"):
        next(iterator)


def test_interpreter_exits_quietly_with_an_open_stream(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    program = (
        "from looplm_jax import data, config\n"
        "from looplm_jax.data import _packing as packing\n"
        "packing._SHUFFLED_PIECES = 256\n"
        f"d = config.DataConfig(sources=(config.SourceConfig(path={str(path)!r}),), validation_fraction=0.2)\n"
        "t = data.train_sentencepiece(data.training_texts(d), 300)\n"
        "b = data.train_batches(d, t, batch_size=2, sequence_length=16, seed=0)\n"
        "print(next(b).tokens.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("(2, 16)\n", "", 0)
