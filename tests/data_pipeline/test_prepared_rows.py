"""The bytes of a row preserve the row, and rows preserve the documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.corpus._shards import (
    BadSequence,
    Segment,
    decode_segments,
    decode_sequence,
    encode_sequence,
    pieces,
    token_type,
)
from looplm_jax.corpus._worker import pack_segments, shuffled
from looplm_jax.data import Example
from looplm_jax.data._examples import chunks


@st.composite
def examples(draw, most=40, vocab_size=70_000):
    size = draw(st.integers(0, most))
    tokens = draw(st.lists(st.integers(0, vocab_size - 1), min_size=size + 1, max_size=size + 1))
    return Example.of(tokens, [False, *draw(st.lists(st.booleans(), min_size=size, max_size=size))])


def same(ours: Segment, theirs: Segment) -> bool:
    return ours.tokens.tolist() == theirs.tokens.tolist() and ours.loss_mask.tolist() == theirs.loss_mask.tolist()


@given(examples(), st.integers(1, 50))
def test_pieces_are_those_of_packing_on_the_fly(example, length):
    ours, theirs = pieces(example, length), chunks(example, length)
    assert len(ours) == len(theirs)
    assert sum(piece.loss_mask.sum() for piece in ours) == example.loss_mask.sum()
    assert all(piece.loss_mask.any() for piece in ours)
    for piece, chunk in zip(ours, theirs, strict=True):
        assert piece.tokens[:-1].tolist() == chunk["tokens"].tolist()
        assert piece.tokens[1:].tolist() == chunk["targets"].tolist()
        assert piece.loss_mask.tolist() == chunk["loss_mask"].tolist()


@given(st.lists(examples(most=9), min_size=1, max_size=8), st.integers(0, 5), st.sampled_from([256, 65536, 70_000]))
def test_a_row_comes_back(documents, padding, vocab_size):
    documents = [Example(example.tokens % vocab_size, example.loss_mask) for example in documents]
    segments = [piece for example in documents for piece in pieces(example, 9)]
    if not segments:
        return
    kind = token_type(vocab_size)
    record = encode_sequence(segments, kind)
    assert all(same(a, b) for a, b in zip(segments, decode_segments(record, kind), strict=True))
    length = sum(segment.positions for segment in segments) + padding
    row = decode_sequence(record, length, kind)
    assert {values.shape for values in row.values()} == {(length,)}
    for number, segment in enumerate(segments, start=1):
        at = row["tokens_segment_ids"] == number
        assert row["tokens"][at].tolist() == segment.tokens[:-1].tolist()
        assert row["targets"][at].tolist() == segment.tokens[1:].tolist()
        assert row["tokens_positions"][at].tolist() == list(range(segment.positions))
        assert row["loss_mask"][at].tolist() == segment.loss_mask.tolist()
    empty = row["tokens_segment_ids"] == 0
    assert empty.sum() == padding
    assert not any(values[empty].any() for values in row.values())


def test_tokens_are_stored_in_few_bytes():
    segment = Segment(np.arange(4097, dtype=np.int32), np.ones(4096, bool))
    assert (token_type(65536), token_type(65537)) == (np.dtype("<u2"), np.dtype("<u4"))
    assert len(encode_sequence([segment], token_type(49152))) == 2 * 4097 + 16


@given(st.binary(max_size=60))
def test_bytes_that_are_no_row(record):
    with pytest.raises(BadSequence):
        decode_sequence(b"\xff" + record, 8, token_type(256))


def test_a_row_that_is_too_long():
    record = encode_sequence(pieces(Example.of(range(9), [True] * 9), 8), token_type(256))
    with pytest.raises(BadSequence, match="it holds 8 positions"):
        decode_sequence(record, 7, token_type(256))


@given(st.lists(examples(most=30), max_size=60), st.integers(1, 16))
def test_every_piece_is_in_one_row(documents, length):
    segments = [piece for example in documents for piece in pieces(example, length)]
    rows = list(pack_segments(shuffled(segments, length, seed=3), length))
    assert sorted(id(piece) for row in rows for piece in row) == sorted(id(piece) for piece in segments)
    used = [sum(piece.positions for piece in row) for row in rows]
    assert all(0 < positions <= length for positions in used)


def test_rows_are_nearly_full():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 200, 4000)
    documents = [Segment(np.zeros(n + 1, np.int32), np.ones(n, bool)) for n in lengths.tolist()]
    rows = list(pack_segments(documents, 256))
    assert lengths.sum() / (256 * len(rows)) > 0.97


def test_a_window_is_shuffled_the_same_way_every_time():
    documents = [Segment(np.full(2, n, np.int32), np.ones(1, bool)) for n in range(300)]
    first, second, other = ([s.tokens[0] for s in shuffled(documents, 4096, seed)] for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert sorted(first) == list(range(300))
