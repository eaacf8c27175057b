"""The global batch is the same for any number of processes, and any number can resume at its position."""

import dataclasses
import json

import numpy as np
import pytest

from looplm_jax.data import Batch, SubstreamBatches, open_corpus, substream_count, train_batches
from looplm_jax.errors import UserError

ROWS, LENGTH = 8, 32


@pytest.fixture
def stream(text_data, tokenizer):
    """Returns a function that opens the stream of one of several processes; all are closed at the end of the test."""
    opened, corpus = [], open_corpus(text_data)

    def make(process=0, processes=1, substreams=2, microbatches=1):
        microbatch_sequences = ROWS // microbatches
        share = microbatch_sequences // processes

        def open_substream(substream):
            geometry = {
                "batch_size": ROWS,
                "sequence_length": LENGTH,
                "process_index": substream,
                "process_count": substreams,
            }
            return train_batches(corpus, tokenizer, seed=0, **geometry)

        rows = range(process * share, (process + 1) * share)
        opened.append(
            SubstreamBatches(
                open_substream,
                substreams=substreams,
                sequences=rows,
                microbatch_sequences=microbatch_sequences,
                microbatches=microbatches,
            )
        )
        return opened[-1]

    yield make
    for batches in opened:
        batches.close()


def joined(shares, microbatches):
    """Returns the global batch `[microbatches, rows, positions]` of every field, from the slices of all processes."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return {
        name: np.concatenate([getattr(share, name).reshape(microbatches, -1, LENGTH) for share in shares], axis=1)
        for name in names
    }


def merged(states):
    """Merges states as checkpoints do."""
    return json.loads(
        json.dumps({"lanes": {name: substream for state in states for name, substream in state["lanes"].items()}})
    )


@pytest.mark.parametrize(
    ("substreams", "microbatches"),
    [(2, 1), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [(1, 1), (1, 2), (2, 2), (4, 1), (4, 2)])],
)
def test_any_number_of_processes_gives_the_same_batches_and_goes_on_from_any_other(stream, substreams, microbatches):
    whole = stream(substreams=substreams, microbatches=microbatches)
    wanted = [joined([next(whole)], microbatches) for _ in range(9)]
    state, at = None, 0
    for processes in (2, 1, 4):
        shares = [stream(process, processes, substreams, microbatches) for process in range(processes)]
        if state is not None:
            for share in shares:
                share.restore(state)
        for step in range(at, at + 3):
            np.testing.assert_equal(joined([next(share) for share in shares], microbatches), wanted[step])
        state, at = merged([share.state() for share in shares]), at + 3


def test_a_single_lane_is_the_plain_stream(stream, text_data, tokenizer):
    ours = stream(substreams=1)
    plain = train_batches(text_data, tokenizer, seed=0, batch_size=ROWS, sequence_length=LENGTH)
    np.testing.assert_equal(dataclasses.asdict(next(ours)), dataclasses.asdict(next(plain)))
    ours.restore(plain.state())  # as saved by versions without substreams
    np.testing.assert_equal(dataclasses.asdict(next(ours)), dataclasses.asdict(next(plain)))
    plain.close()


def test_the_place_in_other_lanes_is_refused(stream):
    with pytest.raises(UserError, match="process_count: 1 then, 2 now"):
        stream(substreams=2).restore(stream(substreams=1).state())


@pytest.mark.parametrize(
    ("batch_size", "length", "substreams"),
    [(8, 256, 1), (1024, 4096, 32), (2048, 4096, 64), (128, 65536, 64), (96, 4096, 2)],
)
def test_lanes_follow_from_the_shape_of_the_batch(batch_size, length, substreams):
    assert substream_count(batch_size, length) == substreams


def test_a_stream_that_continues_has_the_lanes_it_had(stream, text_data, tokenizer):
    assert substream_count(2048, 4096, stream(substreams=4).state()) == 4
    plain = train_batches(text_data, tokenizer, seed=0, batch_size=ROWS, sequence_length=LENGTH)
    assert substream_count(2048, 4096, plain.state()) == 1
    plain.close()


class NumberedRows:
    """A substream whose rows contain the number of the substream and their own number."""

    def __init__(self, substream, rows):
        self.substream, self.rows, self.done = substream, rows, 0

    def __next__(self):
        numbers = self.done * self.rows + np.arange(self.rows)
        self.done += 1
        rows = np.stack([np.full(self.rows, self.substream), numbers], axis=1)
        return Batch(tokens=rows, targets=rows, segment_ids=rows, positions=rows, loss_mask=rows)

    def state(self):
        return {"done": self.done}

    def restore(self, state):
        self.done = state["done"]


@pytest.mark.parametrize("substreams", [1, 2, 4, 8])
def test_a_batch_holds_the_same_rows_in_any_number_of_parts(substreams):
    """Also after resuming at a position that was saved with another number of microbatches."""
    state = None
    for step, (microbatches, processes) in enumerate([(1, 1), (2, 2), (4, 1), (8, 1), (4, 2), (1, 4)]):
        microbatch_sequences, width = ROWS // microbatches, ROWS // substreams
        shares = [
            SubstreamBatches(
                lambda substream: NumberedRows(substream, width),  # noqa: B023
                substreams=substreams,
                sequences=rows,
                microbatch_sequences=microbatch_sequences,
                microbatches=microbatches,
            )
            for rows in np.split(np.arange(microbatch_sequences), processes)
        ]
        if state is not None:
            for share in shares:
                share.restore(state)
        rows = sorted(tuple(row) for share in shares for row in next(share).tokens.tolist())
        assert rows == [(substream, step * width + row) for substream in range(substreams) for row in range(width)]
        state = merged([share.state() for share in shares])
