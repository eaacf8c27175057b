"""The global batch is the same for any number of processes, and any number can resume at its position."""

import dataclasses
import json

import numpy as np
import pytest

from looplm_jax.data import Batch, LaneBatches, lane_count, open_corpus, train_batches
from looplm_jax.errors import UserError

ROWS, LENGTH = 8, 32


@pytest.fixture
def stream(text_data, tokenizer):
    """Returns a function that opens the stream of one of several processes; all are closed at the end of the test."""
    opened, corpus = [], open_corpus(text_data)

    def make(process=0, processes=1, lanes=2, parts=1):
        part_rows = ROWS // parts
        share = part_rows // processes

        def open_lane(lane):
            geometry = {"batch_size": ROWS, "sequence_length": LENGTH, "process_index": lane, "process_count": lanes}
            return train_batches(corpus, tokenizer, seed=0, **geometry)

        rows = range(process * share, (process + 1) * share)
        opened.append(LaneBatches(open_lane, lanes=lanes, rows=rows, part_rows=part_rows, parts=parts))
        return opened[-1]

    yield make
    for batches in opened:
        batches.close()


def joined(shares, parts):
    """Returns the global batch `[parts, rows, positions]` of every field, from the slices of all processes."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return {
        name: np.concatenate([getattr(share, name).reshape(parts, -1, LENGTH) for share in shares], axis=1)
        for name in names
    }


def merged(states):
    """Merges states as checkpoints do."""
    return json.loads(json.dumps({"lanes": {name: lane for state in states for name, lane in state["lanes"].items()}}))


@pytest.mark.parametrize(
    ("lanes", "parts"),
    [(2, 1), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [(1, 1), (1, 2), (2, 2), (4, 1), (4, 2)])],
)
def test_any_number_of_processes_gives_the_same_batches_and_goes_on_from_any_other(stream, lanes, parts):
    whole = stream(lanes=lanes, parts=parts)
    wanted = [joined([next(whole)], parts) for _ in range(9)]
    state, at = None, 0
    for processes in (2, 1, 4):
        shares = [stream(process, processes, lanes, parts) for process in range(processes)]
        if state is not None:
            for share in shares:
                share.restore(state)
        for step in range(at, at + 3):
            np.testing.assert_equal(joined([next(share) for share in shares], parts), wanted[step])
        state, at = merged([share.state() for share in shares]), at + 3


def test_a_single_lane_is_the_plain_stream(stream, text_data, tokenizer):
    ours = stream(lanes=1)
    plain = train_batches(text_data, tokenizer, seed=0, batch_size=ROWS, sequence_length=LENGTH)
    np.testing.assert_equal(dataclasses.asdict(next(ours)), dataclasses.asdict(next(plain)))
    ours.restore(plain.state())  # as saved by versions without substreams
    np.testing.assert_equal(dataclasses.asdict(next(ours)), dataclasses.asdict(next(plain)))
    plain.close()


def test_the_place_in_other_lanes_is_refused(stream):
    with pytest.raises(UserError, match="process_count: 1 then, 2 now"):
        stream(lanes=2).restore(stream(lanes=1).state())


@pytest.mark.parametrize(
    ("batch_size", "length", "lanes"),
    [(8, 256, 1), (1024, 4096, 32), (2048, 4096, 64), (128, 65536, 64), (96, 4096, 2)],
)
def test_lanes_follow_from_the_shape_of_the_batch(batch_size, length, lanes):
    assert lane_count(batch_size, length) == lanes


def test_a_stream_that_continues_has_the_lanes_it_had(stream, text_data, tokenizer):
    assert lane_count(2048, 4096, stream(lanes=4).state()) == 4
    plain = train_batches(text_data, tokenizer, seed=0, batch_size=ROWS, sequence_length=LENGTH)
    assert lane_count(2048, 4096, plain.state()) == 1
    plain.close()


class NumberedRows:
    """A substream whose rows contain the number of the substream and their own number."""

    def __init__(self, lane, rows):
        self.lane, self.rows, self.done = lane, rows, 0

    def __next__(self):
        numbers = self.done * self.rows + np.arange(self.rows)
        self.done += 1
        rows = np.stack([np.full(self.rows, self.lane), numbers], axis=1)
        return Batch(tokens=rows, targets=rows, segment_ids=rows, positions=rows, loss_mask=rows)

    def state(self):
        return {"done": self.done}

    def restore(self, state):
        self.done = state["done"]


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
def test_a_batch_holds_the_same_rows_in_any_number_of_parts(lanes):
    """Also after resuming at a position that was saved with another number of microbatches."""
    state = None
    for step, (parts, processes) in enumerate([(1, 1), (2, 2), (4, 1), (8, 1), (4, 2), (1, 4)]):
        part_rows, width = ROWS // parts, ROWS // lanes
        shares = [
            LaneBatches(
                lambda lane: NumberedRows(lane, width),  # noqa: B023
                lanes=lanes,
                rows=rows,
                part_rows=part_rows,
                parts=parts,
            )
            for rows in np.split(np.arange(part_rows), processes)
        ]
        if state is not None:
            for share in shares:
                share.restore(state)
        rows = sorted(tuple(row) for share in shares for row in next(share).tokens.tolist())
        assert rows == [(lane, step * width + row) for lane in range(lanes) for row in range(width)]
        state = merged([share.state() for share in shares])
