"""Packing of examples into sequences of one length, with segment ids that separate the examples."""

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import grain.experimental
import numpy as np
from jaxtyping import Float32, Int32

from looplm_jax.data.documents import Example
from looplm_jax.data.examples import chunks

# Sequences that are open for packing. More of them waste fewer positions but cost memory and time to restore.
_OPEN_ROWS = 64

# Size of the shuffle window. A resumed stream reads its window again: at most a few seconds at this size.
_SHUFFLED_PIECES = 2**12
_SHUFFLED_TOKENS = 2**21


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """B packed sequences of S positions. A position attends only to positions of the same segment."""

    tokens: Int32[np.ndarray, "B S"]
    targets: Int32[np.ndarray, "B S"]  # the next token of the same segment
    segment_ids: Int32[np.ndarray, "B S"]  # 1, 2, … within a sequence; 0 is padding
    positions: Int32[np.ndarray, "B S"]  # 0, 1, … within a segment
    loss_mask: Float32[np.ndarray, "B S"]  # 1 where the target counts


class _Chunks(grain.experimental.FlatMapTransform):
    """A Grain transform that splits an example into chunks that fit into a sequence."""

    max_fan_out = 1  # only map datasets use this limit; after an iterator, an example may become any number of chunks

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: Example) -> Sequence[dict[str, np.ndarray]]:
        return chunks(element, self._length)


def pack(examples: grain.IterDataset, sequence_length: int, *, shuffle_seed: int) -> grain.IterDataset:
    """Packs examples first-fit into sequences of `sequence_length` positions. Longer examples are split.

    Chunks are shuffled within a window of many documents before packing, because the chunks of one long document would
    otherwise fill whole batches.

    Args:
      examples: the examples to pack.
      sequence_length: positions in a sequence.
      shuffle_seed: seed of the shuffle window and of the order in which finished sequences are returned.

    Returns:
      Packed features with Grain's names (see `as_batch`).
    """
    features = ("tokens", "targets", "loss_mask")
    # The window is bounded in chunks and in tokens, and is never smaller than the number of open sequences.
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
    """Returns packed features, named by Grain, as a `Batch`."""
    return Batch(
        tokens=rows["tokens"],
        targets=rows["targets"],
        segment_ids=rows["tokens_segment_ids"],
        positions=rows["tokens_positions"],
        loss_mask=rows["loss_mask"],
    )
