"""Examples packed into rows of one length, with segment ids that keep them apart."""

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import grain.experimental
import numpy as np
from jaxtyping import Float32, Int32

from looplm_jax.data.documents import Example
from looplm_jax.data.examples import chunks

# Rows that are filled side by side. More rows waste fewer positions and cost memory and time to restore.
_OPEN_ROWS = 64

# A resumed stream reads its window again: at most a few seconds at this size.
_SHUFFLED_PIECES = 2**12
_SHUFFLED_TOKENS = 2**21


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """B rows of S positions. Attention is allowed within one segment only."""

    tokens: Int32[np.ndarray, "B S"]
    targets: Int32[np.ndarray, "B S"]  # the token after each, of the same segment
    segment_ids: Int32[np.ndarray, "B S"]  # 1, 2, … within a row; 0 is padding
    positions: Int32[np.ndarray, "B S"]  # 0, 1, … within a segment
    loss_mask: Float32[np.ndarray, "B S"]  # 1 where the target counts


class _Chunks(grain.experimental.FlatMapTransform):
    """An example into pieces that fit a row."""

    max_fan_out = 1  # read by map datasets only; after an iterator an example may give any number of pieces

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: Example) -> Sequence[dict[str, np.ndarray]]:
        return chunks(element, self._length)


def pack(examples: grain.IterDataset, sequence_length: int, *, shuffle_seed: int) -> grain.IterDataset:
    """Rows of `sequence_length`, packed first-fit; longer examples are cut.

    The pieces of one long document would fill whole batches, so pieces are shuffled within a window of many
    documents first.
    """
    features = ("tokens", "targets", "loss_mask")
    pieces = grain.experimental.WindowShuffleIterDataset(
        grain.experimental.FlatMapIterDataset(examples, _Chunks(sequence_length)),
        window_size=min(_SHUFFLED_PIECES, max(_SHUFFLED_TOKENS // sequence_length, _OPEN_ROWS)),
        seed=shuffle_seed,
    )
    return grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct=dict.fromkeys(features, sequence_length),
        num_packing_bins=_OPEN_ROWS,
        seed=shuffle_seed,
        shuffle_bins=True,
    )


def as_batch(rows: Mapping[str, np.ndarray]) -> Batch:
    """Grain's packed features under our names."""
    return Batch(
        tokens=rows["tokens"],
        targets=rows["targets"],
        segment_ids=rows["tokens_segment_ids"],
        positions=rows["tokens_positions"],
        loss_mask=rows["loss_mask"],
    )
