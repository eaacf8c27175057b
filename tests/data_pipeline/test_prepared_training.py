"""Training on prepared rows: the same batches for every reader, an exact position, and few threads."""

import dataclasses
import json
import os

import numpy as np
import pytest
from data_helpers import make_texts, write_jsonl
from prepared_helpers import LENGTH, prepared, segments

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.corpus import open_prepared
from looplm_jax.data import Batch, SubstreamBatches, open_corpus, train_batches, training_texts, validation_batches
from looplm_jax.data._pipeline import mixture
from looplm_jax.data.tokenizers import train_sentencepiece
from looplm_jax.errors import UserError
from looplm_jax.testing import assert_resumes_exactly

ROWS = 8
GEOMETRY = {"batch_size": ROWS, "sequence_length": LENGTH}


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Prepares two sources."""
    folder = tmp_path_factory.mktemp("sources")
    texts = make_texts(120)
    for name, some in (("a", texts[:80]), ("b", texts[80:])):
        path = write_jsonl(folder / f"{name}.jsonl", some)
        prepared(tokenizer, folder / name, path, unit_bytes=5000)
    return folder


@pytest.fixture(scope="module")
def corpus(folders):
    sources = (SourceConfig(path="a", weight=2.0), SourceConfig(path="b"))
    return open_corpus(DataConfig(sources=sources, root=str(folders)))


@pytest.fixture
def stream(corpus, tokenizer):
    opened = []

    def make(data=corpus, seed=0, **geometry):
        opened.append(train_batches(data, tokenizer, seed=seed, **{**GEOMETRY, **geometry}))
        return opened[-1]

    yield make
    for batches in opened:
        batches.close()


def arrays(batches):
    return [dataclasses.asdict(batch) for batch in batches]


def take(batches, count):
    return arrays(next(batches) for _ in range(count))


def row_keys(batches):
    return [tuple(row) for batch in batches for row in batch["tokens"].tolist()]


def test_batches_are_the_rows_that_were_written(stream, folders):
    [batch] = take(stream(), 1)
    assert {values.shape for values in batch.values()} == {(ROWS, LENGTH)}
    kinds = {name: values.dtype for name, values in batch.items()}
    assert kinds == {**dict.fromkeys(kinds, np.dtype(np.int32)), "loss_mask": np.dtype(np.float32)}
    written = [open_prepared(str(folders / name)).train for name in "ab"]
    known = {tuple(rows[index]["tokens"].tolist()) for rows in written for index in range(len(rows))}
    assert known.issuperset(row_keys([batch]))


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order(folders):
    corpus = opened(folders, "a")
    rows, size = mixture(corpus, 0), corpus.prepared[0].manifest.rows
    epochs = [[tuple(rows[start + index]["tokens"]) for index in range(size)] for start in (0, size)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(tuple(corpus.prepared[0].corpus.train[index]["tokens"]) for index in range(size))


def test_weights_are_shares_of_rows(corpus):
    rows = mixture(corpus, 0)
    first = {
        tuple(corpus.prepared[0].corpus.train[index]["tokens"]) for index in range(len(corpus.prepared[0].corpus.train))
    }
    found = sum(tuple(rows[index]["tokens"]) in first for index in range(90))
    assert 60 <= found <= 65  # some short documents occur in both


@pytest.mark.parametrize("batches", [0, 1, 7])
def test_resume_is_exact(batches, stream):
    assert_resumes_exactly(stream, done=batches, more=5)


def test_the_state_is_small(stream):
    original = stream()
    take(original, 7)
    assert len(json.dumps(original.state())) < 2000


def test_the_seed_fixes_the_order(stream):
    first, again, other = (take(stream(seed=seed), 2) for seed in (0, 0, 1))
    np.testing.assert_equal(first, again)
    assert row_keys(first) != row_keys(other)


def test_the_place_belongs_to_the_rows(stream, folders, tokenizer, tmp_path):
    state = stream().state()
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    prepared(tokenizer, tmp_path / "a", path)
    others = DataConfig(
        sources=(SourceConfig(path="a", weight=2.0), SourceConfig(path="a")),
        root=str(tmp_path),
        validation_fraction=0.0,
    )
    with pytest.raises(UserError, match=r"content: '[0-9a-f]+' then, '[0-9a-f]+' now"):
        stream(open_corpus(others)).restore(state)


def lanes(stream, process=0, processes=1, lanes=4):
    share = ROWS // processes
    rows = range(process * share, (process + 1) * share)
    return SubstreamBatches(
        lambda lane: stream(process_index=lane, process_count=lanes),
        substreams=lanes,
        sequences=rows,
        microbatch_sequences=ROWS,
    )


def test_any_number_of_processes_gives_the_same_batches_and_goes_on_from_any_other(stream):
    whole = take(lanes(stream), 6)
    state, at = None, 0
    for processes in (2, 1, 4):
        shares = [lanes(stream, process, processes) for process in range(processes)]
        if state is not None:
            for share in shares:
                share.restore(state)
        for step in range(at, at + 2):
            parts = arrays(next(share) for share in shares)
            for field in dataclasses.fields(Batch):
                joined = np.concatenate([part[field.name] for part in parts])
                np.testing.assert_array_equal(joined, whole[step][field.name])
        merged = {name: lane for share in shares for name, lane in share.state()["lanes"].items()}
        state, at = json.loads(json.dumps({"lanes": merged})), at + 2


def test_thirty_sources_and_lanes_share_their_threads(folders, tokenizer):
    sources = tuple(SourceConfig(path="ab"[number % 2], weight=1 + number) for number in range(30))
    corpus = open_corpus(DataConfig(sources=sources, root=str(folders)))
    one = train_batches(corpus, tokenizer, batch_size=64, sequence_length=LENGTH, seed=0)
    next(one)
    before = len(os.listdir("/proc/self/task"))
    opened = [
        train_batches(
            corpus, tokenizer, batch_size=64, sequence_length=LENGTH, seed=0, process_index=lane, process_count=32
        )
        for lane in range(32)
    ]
    for batches in opened:
        next(batches)
    assert len(os.listdir("/proc/self/task")) <= max(before, 90)  # 64 are ArrayRecord's own, 16 ours
    assert len(os.listdir("/proc/self/task")) - before <= 16
    for batches in (one, *opened):
        batches.close()


def test_held_out_rows(corpus, folders, tokenizer):
    whole = validation_batches(corpus, tokenizer, **GEOMETRY)
    assert whole.num_sequences == sum(len(part.corpus.validation) for part in corpus.prepared)
    wanted = [s for name in "ab" for s in segments(open_prepared(str(folders / name)).validation)]
    batches = arrays(whole)
    assert sum(batch["loss_mask"].sum() for batch in batches) == sum(segment.loss_mask.sum() for segment in wanted)
    shares = [validation_batches(corpus, tokenizer, process_index=p, process_count=2, **GEOMETRY) for p in range(2)]
    for batch, *parts in zip(batches, *map(arrays, shares), strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
    first = validation_batches(corpus, tokenizer, max_sequences=2, **GEOMETRY)
    assert first.num_sequences == 2
    np.testing.assert_equal(arrays(first)[0]["tokens"][:2], batches[0]["tokens"][:2])


def test_counts_and_tokenizer_come_from_the_manifests(corpus, tokenizer):
    assert corpus.train_documents + corpus.validation_documents == 120
    assert corpus.own_tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="'a' has its own tokenizer; there is none to train"):
        training_texts(corpus)


def opened(folders, *paths, held_out=0.0):
    sources = tuple(SourceConfig(path=str(path)) for path in paths)
    return open_corpus(DataConfig(sources=sources, root=str(folders), validation_fraction=held_out))


def test_what_cannot_be_mixed(folders, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"'a' is prepared and 'b.jsonl' is not; a mixture is all prepared or none"):
        opened(folders, "b.jsonl", "a")
    with pytest.raises(UserError, match="'a' is prepared and 'mano:length=2' is not"):
        opened(folders, "a", "mano:length=2")
    path = folders / "a.jsonl"
    prepared(tokenizer, tmp_path / "long", path, sequence_length=64, validation_fraction=0.0)
    with pytest.raises(
        UserError, match=r"'a' is prepared in sequences of 32 and '.*/long' of 64; prepare both for the same"
    ):
        opened(folders, "a", tmp_path / "long")
    with pytest.raises(UserError, match="no sequence of the prepared sources is held out; prepare one with"):
        opened(folders, tmp_path / "long", held_out=0.02)
    prepared(train_sentencepiece(make_texts(90), 310), tmp_path / "other", path)
    with pytest.raises(UserError, match=r"'a' and '.*/other' are prepared with different tokenizers"):
        opened(folders, "a", tmp_path / "other")
    with pytest.raises(UserError, match="'a' is prepared with another tokenizer than that of the run"):
        train_batches(opened(folders, "a"), opened(folders, tmp_path / "other").own_tokenizer, seed=0, **GEOMETRY)
    with pytest.raises(UserError, match="'a' is prepared in sequences of 32, and sequence_length is 64; set it to 32"):
        train_batches(opened(folders, "a"), tokenizer, seed=0, batch_size=2, sequence_length=64)


def test_a_shard_that_vanishes_is_named(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    prepared(tokenizer, tmp_path / "a", path, unit_bytes=10**6)
    batches = train_batches(opened(tmp_path, "a"), tokenizer, seed=0, **GEOMETRY)
    (tmp_path / "a" / "train-00000.arrayrecord").unlink()
    with pytest.raises(UserError, match=r"a/train-00000.arrayrecord is damaged or missing"):
        next(batches)
    batches.close()


def test_an_unfinished_corpus_is_refused(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    prepared(tokenizer, tmp_path / "a", path)
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(UserError, match="a is not finished; run the same `looplm tokenize` command again"):
        opened(tmp_path, "a")
