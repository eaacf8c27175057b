"""Segments packed first-fit into rows, one pass, with bounded memory.

The same law as `data.packing`: pieces are shuffled within a window, then go to the first of 64 open rows that has room.
Grain's own packer would bring JAX into every worker. Here only the fullest row makes room for a new one, where Grain
lets go of all.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from looplm_jax.data.prepared.row import Segment

_OPEN_ROWS = 64
_WINDOW_PIECES = 2**12
_WINDOW_TOKENS = 2**21


def shuffled(pieces: Iterable[Segment], length: int, seed: int) -> Iterator[Segment]:
    """The pieces in another order, each within a window: a long document does not fill whole rows side by side."""
    window = min(_WINDOW_PIECES, max(_WINDOW_TOKENS // length, _OPEN_ROWS))
    random = np.random.default_rng(seed)
    stream = iter(pieces)
    while some := list(itertools.islice(stream, window)):
        yield from (some[place] for place in random.permutation(len(some)))


def pack_rows(pieces: Iterable[Segment], length: int) -> Iterator[list[Segment]]:
    """Rows of at most `length` positions. Every piece is in one of them; none is longer than a row."""
    rows: list[list[Segment]] = []
    room: list[int] = []
    for piece in pieces:
        place = next((row for row, left in enumerate(room) if left >= piece.positions), len(rows))
        if place == len(rows) == _OPEN_ROWS:
            fullest = room.index(min(room))
            room.pop(fullest)
            yield rows.pop(fullest)
            place -= 1
        if place == len(rows):
            rows.append([])
            room.append(length)
        rows[place].append(piece)
        room[place] -= piece.positions
        if room[place] == 0:
            room.pop(place)
            yield rows.pop(place)
    yield from rows
