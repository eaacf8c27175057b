"""Packing of examples into sequences of one length, with segment ids that separate the examples.

Text goes through Grain's first-fit packer, one example at a time. Problems of synthetic tasks are packed in blocks,
with a few NumPy calls for many problems.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import grain
import grain.experimental
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from looplm_jax.data._examples import Example, chunks
from looplm_jax.data.tasks._base import Problems

# Sequences that are open for packing. More of them waste fewer positions but cost memory and time to restore.
_OPEN_SEQUENCES = 64

# Size of the shuffle window. A resumed stream reads its window again: at most a few seconds at this size.
_SHUFFLED_PIECES = 2**12
_SHUFFLED_TOKENS = 2**21

PackedFeatures = Mapping[str, np.ndarray]
"""Features of packed sequences, [R, S] each, named as Grain names those that it packs."""


ArrayT = TypeVar("ArrayT", bound=np.ndarray | Array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batch(Generic[ArrayT]):
    """B packed sequences of S positions. A position attends only to positions of the same segment.

    This is the one form of a batch: in NumPy arrays on the host (`Batch[np.ndarray]`), on the devices (`Batch[Array]`),
    where training puts the A microbatches of a step on a leading axis, and inside jitted functions, as a pytree.
    """

    tokens: Int[ArrayT, "*A B S"]
    targets: Int[ArrayT, "*A B S"]  # the next token of the same segment
    segment_ids: Int[ArrayT, "*A B S"]  # 1, 2, … within a sequence; 0 is padding
    positions: Int[ArrayT, "*A B S"]  # 0, 1, … within a segment
    loss_mask: Float[ArrayT, "*A B S"]  # 1 where the target counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DepthBatch(Batch[ArrayT]):
    """A batch for training in which each sequence has its own number of loops."""

    depths: Int[ArrayT, "*A B S"]  # the same at all positions of a sequence


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
        window_size=min(_SHUFFLED_PIECES, max(_SHUFFLED_TOKENS // sequence_length, _OPEN_SEQUENCES)),
        seed=shuffle_seed,
    )

    return grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct=dict.fromkeys(features, sequence_length),
        num_packing_bins=_OPEN_SEQUENCES,
        seed=shuffle_seed,
        shuffle_bins=True,
    )


def as_batch(packed: PackedFeatures) -> Batch[np.ndarray]:
    """Returns packed features, named by Grain, as a `Batch`."""
    return Batch(
        tokens=packed["tokens"],
        targets=packed["targets"],
        segment_ids=packed["tokens_segment_ids"],
        positions=packed["tokens_positions"],
        loss_mask=packed["loss_mask"],
    )


# Problems of synthetic tasks


def pack_problems(problems: Problems, length: int) -> PackedFeatures:
    """Packs problems first-fit into R sequences of `length` positions, each problem a segment.

    A problem of n tokens takes n - 1 positions, each with the next token as its target. No problem may be longer than a
    sequence.

    Returns:
      Features of shape [R, S], named as Grain names packed features.
    """
    sizes = problems.lengths - 1
    sequences, starts, number, count = _first_fit(sizes.tolist(), length)

    # Indices of all occupied positions, problem by problem: within its problem, in the concatenated tokens, and in the
    # flattened [R * S] output.
    total = int(sizes.sum())
    of_problem = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source = np.repeat(np.cumsum(problems.lengths) - problems.lengths, sizes) + of_problem
    place = np.repeat(sequences * length + starts, sizes) + of_problem

    def spread(values: np.ndarray, kind: type) -> np.ndarray:
        """Scatters values into the flattened output and reshapes it to [R, S]."""
        flat: np.ndarray = np.zeros(count * length, kind)
        flat[place] = values
        return flat.reshape(count, length)

    return {
        "tokens": spread(problems.tokens[source], np.int32),
        "targets": spread(problems.tokens[source + 1], np.int32),
        "tokens_segment_ids": spread(np.repeat(number, sizes), np.int32),
        "tokens_positions": spread(of_problem, np.int32),
        "loss_mask": spread(problems.loss_mask[source + 1], np.float32),
    }


def _first_fit(
    sizes: Sequence[int], length: int
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"], Int[np.ndarray, "N"], int]:
    """Assigns each of N sizes to the first open sequence that has room for it.

    Returns:
      For each size, its sequence, its start in the sequence, and its segment number in the sequence, counted from 1;
      and the total number of sequences.
    """
    smallest = min(sizes)
    # Per sequence: occupied positions and number of segments.
    used: list[int] = []
    held: list[int] = []

    open_sequences: list[int] = []
    placed: list[tuple[int, int, int]] = []

    for size in sizes:
        sequence = next((sequence for sequence in open_sequences if used[sequence] + size <= length), len(used))

        if sequence == len(used):
            used.append(0)
            held.append(0)
            open_sequences.append(sequence)
            if len(open_sequences) > _OPEN_SEQUENCES:
                open_sequences.pop(0)

        held[sequence] += 1
        placed.append((sequence, used[sequence], held[sequence]))
        used[sequence] += size
        # Sequences that cannot take even the smallest problem are closed, which keeps the search short.
        if used[sequence] + smallest > length:
            open_sequences.remove(sequence)

    sequences, starts, numbers = np.array(placed).T
    return sequences, starts, numbers, len(used)
