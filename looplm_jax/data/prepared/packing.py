"""First-fit packing of segments into sequences, in one pass and with bounded memory.

The algorithm is that of `data.packing`: segments are shuffled within a window and then added to the first of 64 open
sequences that has room. It is implemented here because Grain's packer would import JAX in every worker. One difference:
if no open sequence has room, only the fullest is closed, where Grain closes all.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from looplm_jax.data.prepared.row import Segment

# The same values as in `data.packing`.
_OPEN_ROWS = 64
_WINDOW_PIECES = 2**12
_WINDOW_TOKENS = 2**21


def shuffled(pieces: Iterable[Segment], length: int, seed: int) -> Iterator[Segment]:
    """Yields the segments shuffled within a window, so that a long document does not fill consecutive sequences."""
    window = min(_WINDOW_PIECES, max(_WINDOW_TOKENS // length, _OPEN_ROWS))
    random = np.random.default_rng(seed)
    stream = iter(pieces)
    while some := list(itertools.islice(stream, window)):
        yield from (some[place] for place in random.permutation(len(some)))


def pack_rows(pieces: Iterable[Segment], length: int) -> Iterator[list[Segment]]:
    """Yields sequences of at most `length` positions, as lists of segments.

    Every segment is in exactly one sequence. No segment may be longer than a sequence.
    """
    # Parallel lists of the open sequences and their free positions.
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
