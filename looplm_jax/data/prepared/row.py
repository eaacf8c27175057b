"""One row of a prepared corpus as bytes: tokens, where its segments end, and which targets count.

A row of S positions holds segments. A segment of n positions is n + 1 tokens: the inputs are all but the last, the
targets all but the first. All numbers are little-endian:

    uint32 K              segments
    uint32 R              runs of the loss mask
    uint32 [K]            positions of each segment
    uint32 [R]            lengths of the runs, which count, do not count, count, … ; the first may be 0
    uint16 or uint32 []   tokens of all segments, positions + K of them
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int32

from looplm_jax.data.documents import Example

_COUNT = np.dtype("<u4")
_SHORT, _LONG = np.dtype("<u2"), np.dtype("<u4")


class BadRow(ValueError):
    """Bytes that are no row."""


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a document: N positions, as one token more."""

    tokens: Int32[np.ndarray, "N+1"]
    loss_mask: Bool[np.ndarray, "N"]

    @property
    def positions(self) -> int:
        """N."""
        return len(self.loss_mask)


def pieces(example: Example, length: int) -> list[Segment]:
    """The example cut into segments of at most `length` positions.

    The last token of a piece is the first of the next, so no target is lost. Segments without a target are left out.
    """
    mask = example.loss_mask[1:]
    starts = range(0, len(mask), length)
    segments = (Segment(example.tokens[start : start + length + 1], mask[start : start + length]) for start in starts)
    return [segment for segment in segments if segment.loss_mask.any()]


def token_type(vocab_size: int) -> np.dtype:
    """The type that tokens of a vocabulary are stored in."""
    return _SHORT if vocab_size <= 1 << 16 else _LONG


def encode_row(segments: Sequence[Segment], tokens: np.dtype) -> bytes:
    """The row that these segments make."""
    runs = _runs(np.concatenate([segment.loss_mask for segment in segments]))
    lengths = [segment.positions for segment in segments]
    head = np.array([len(segments), len(runs), *lengths, *runs], _COUNT)
    return head.tobytes() + np.concatenate([segment.tokens for segment in segments]).astype(tokens).tobytes()


def decode_segments(record: bytes, tokens: np.dtype) -> list[Segment]:
    """The inverse of `encode_row`. Raises BadRow."""
    parts = _parts(record, tokens)
    stops = np.cumsum(parts.lengths)
    masks = np.split(parts.mask, stops[:-1])
    ids = np.split(parts.tokens, (stops + np.arange(1, len(stops) + 1))[:-1])
    return [Segment(tokens, mask) for tokens, mask in zip(ids, masks, strict=True)]


def decode_row(record: bytes, length: int, tokens: np.dtype) -> Mapping[str, np.ndarray]:
    """The row as features of `length` positions, named as Grain names those that it packs. Raises BadRow."""
    parts = _parts(record, tokens)
    used = len(parts.mask)
    if used > length:
        raise BadRow(f"it holds {used} positions")
    stops = np.cumsum(parts.lengths)
    extra = np.arange(len(stops))  # tokens that earlier segments have beyond their positions
    starts = stops - parts.lengths
    return {
        "tokens": _padded(np.delete(parts.tokens, stops + extra), length, np.int32),
        "targets": _padded(np.delete(parts.tokens, starts + extra), length, np.int32),
        "tokens_segment_ids": _padded(np.repeat(extra + 1, parts.lengths), length, np.int32),
        "tokens_positions": _padded(np.arange(used) - np.repeat(starts, parts.lengths), length, np.int32),
        "loss_mask": _padded(parts.mask, length, np.float32),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    lengths: np.ndarray
    mask: np.ndarray
    tokens: np.ndarray


def _parts(record: bytes, tokens: np.dtype) -> _Parts:
    if len(record) < 2 * _COUNT.itemsize:
        raise BadRow("it is too short")
    segments, runs = (int(count) for count in np.frombuffer(record, _COUNT, 2))
    head = (2 + segments + runs) * _COUNT.itemsize
    if segments == 0 or len(record) < head or (len(record) - head) % tokens.itemsize:
        raise BadRow("its parts do not fit its length")
    lengths, spans = np.split(np.frombuffer(record, _COUNT, segments + runs, 2 * _COUNT.itemsize), [segments])
    lengths, spans = lengths.astype(np.int64), spans.astype(np.int64)
    ids = np.frombuffer(record, tokens, offset=head)
    if lengths.sum() != spans.sum() or len(ids) != lengths.sum() + segments:
        raise BadRow("its parts do not fit each other")
    mask = np.repeat(np.arange(runs) % 2 == 0, spans)
    return _Parts(lengths, mask, ids.astype(np.int32))


def _runs(mask: Bool[np.ndarray, "N"]) -> list[int]:
    """Lengths of runs of equal values, the first of them true."""
    edges = np.flatnonzero(np.diff(mask)) + 1
    lengths = np.diff([0, *edges, len(mask)]).tolist()
    return lengths if mask[0] else [0, *lengths]


def _padded(values: np.ndarray, length: int, kind: type) -> np.ndarray:
    row: np.ndarray = np.zeros(length, kind)
    row[: len(values)] = values
    return row
