"""The batch iterator: an endless stream of batches with an exact, serializable position.

The sequences of a global batch come from one or several substreams with disjoint documents. The number of substreams
depends only on the shape of the batch, so a batch holds the same sequences regardless of how it is split into
microbatches and over processes. Each process opens only the substreams that feed its devices, so large batches divide
the work of reading, tokenizing and packing; small batches have a single substream, which every process reads.
"""

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from looplm_jax.codec import Leaf, differences, leaves
from looplm_jax.config import SourceConfig
from looplm_jax.data._mixture import Corpus
from looplm_jax.data._packing import Batch, as_batch
from looplm_jax.data._streams import Stream
from looplm_jax.data.tokenizers._base import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.resume import may_differ

PROBLEMS = "problems"  # identity key: how task problems are drawn; states saved before it existed mean one at a time
# Fields of sources that are newer than many saved states, so each is part of the identity only if it is set.
_NEWER = ("special_tokens", "prompt_key", "answer_key", "template")
_SOURCE_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SourceConfig)}

# Tokens of a step per substream. Smaller substreams would save little work and keep more open sequences.
_SUBSTREAM_TOKENS = 2**17


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a stream of batches, and the shard of one process.

    Attributes:
      batch_size: sequences in a global batch; a multiple of `process_count`.
      sequence_length: tokens in a sequence.
      process_index: this process.
      process_count: processes that divide each batch.
    """

    batch_size: int
    sequence_length: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.process_count:
            raise UserError(
                f"batch_size={self.batch_size} cannot be shared by {self.process_count} processes; "
                f"make it a multiple of {self.process_count}"
            )

    @property
    def sequences(self) -> int:
        """The number of sequences of a batch that this process holds."""
        return self.batch_size // self.process_count


class BatchIterator:
    """An endless, prefetched stream of batches that can be saved and restored exactly.

    Args:
      batches: the stream.
      identity: everything that determines the order of the stream (see `stream_identity`); `restore` compares it.
      one_by_one: opens the stream as earlier versions drew it, one task problem at a time, to restore states that those
        versions saved.
    """

    def __init__(self, batches: Stream, identity: Mapping[str, Any], *, one_by_one: Callable[[], Stream] | None = None):
        self._identity = dict(identity)
        self._one_by_one = one_by_one
        # A list, so that the finalizer closes the current stream even after `restore` has replaced it.
        self._held = [batches]
        # Grain's threads must stop before interpreter shutdown, even if `close` is never called.
        self._close = weakref.finalize(self, _close, self._held)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch[np.ndarray]:
        return as_batch(next(self._held[0]))

    def state(self) -> dict[str, Any]:
        """Returns the position after the last returned batch: a few hundred bytes of plain JSON values."""
        return {"identity": dict(self._identity), "position": copy.deepcopy(self._held[0].get_state())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to the position right after the batch at which `state` was taken, bit for bit.

        Raises:
          UserError: the state is from other data, another tokenizer or another geometry. The message lists every
            difference.
        """
        saved = state["identity"]

        # A state without the key comes from a version that drew problems one at a time, so reopen the stream that way.
        identity, reopen = self._identity, None
        if self._one_by_one is not None and PROBLEMS not in saved:
            identity, reopen = {key: value for key, value in identity.items() if key != PROBLEMS}, self._one_by_one

        changed = [
            f"{field.path}: {field.ours!r} then, {field.theirs!r} now"
            for field in differences(saved, identity)
            if not may_differ(field.path)
        ]
        if changed:
            raise UserError(
                f"the saved position in the data belongs to another setup ({'; '.join(changed)}); "
                "set these back, or start a new run"
            )

        if reopen is not None:
            self._held[0].close()
            self._held[0], self._identity, self._one_by_one = reopen(), identity, None
        self._held[0].set_state(copy.deepcopy(state["position"]))

    def close(self) -> None:
        """Stops the prefetching threads. The iterator cannot be used afterwards."""
        self._close()


def _close(held: list[Stream]) -> None:
    """Closes the stream and releases it; a module function, so that the finalizer does not keep the iterator alive."""
    held.pop().close()


# Identity


def stream_identity(corpus: Corpus, tokenizer: Tokenizer, geometry: Geometry, seed: int) -> dict[str, Any]:
    """Returns everything that determines the order of tokens, as plain JSON values.

    Two streams with equal identities return equal batches. Fields that may differ on resume (see `looplm_jax.resume`)
    are left out.
    """
    # Enums are stored by value, so that the identity is plain JSON.
    config = {
        f"data.{leaf.path}": getattr(leaf.value, "value", leaf.value)
        for leaf in leaves(corpus.config)
        if not may_differ(f"data.{leaf.path}")
        if not _is_newer_default(leaf)
    }

    return {
        **config,
        "documents": [source.train_documents for source in corpus.sources],
        "content": corpus.digest,
        "tokenizer": tokenizer.fingerprint,
        "seed": seed,
        **dataclasses.asdict(geometry),
        **({PROBLEMS: "blocks"} if corpus.tasks else {}),
    }


def _is_newer_default(leaf: Leaf) -> bool:
    """Whether a field is newer than many saved states, and has its default."""
    name = leaf.path.rpartition(".")[2]
    return name in _NEWER and leaf.value == _SOURCE_DEFAULTS[name]


# Substreams


def substream_count(batch_size: int, sequence_length: int, saved: Mapping[str, Any] | None = None) -> int:
    """Returns the number of substreams: a power of two that divides the number of sequences of a batch.

    Args:
      batch_size: sequences in a global batch.
      sequence_length: tokens in a sequence.
      saved: the saved state of a stream to resume, which determines the number if given.
    """
    # A substream is opened as if it were a process, so its process count is the number of substreams.
    if saved is not None:
        return next(iter(_substream_states(saved).values()))["identity"]["process_count"]

    # The largest power of two that divides the batch and leaves each substream at least _SUBSTREAM_TOKENS per step.
    most = max(1, batch_size * sequence_length // _SUBSTREAM_TOKENS)
    return math.gcd(batch_size, 2 ** (most.bit_length() - 1))


class SubstreamBatches:
    """The sequences of one process in an endless stream of global batches.

    If `substreams` divides `microbatch_sequences`, every microbatch has sequences from every substream, in their order.
    Otherwise each sequence position of the microbatches has its own substreams.

    Args:
      open_substream: opens a substream by number; its batches hold `batch_size / substreams` sequences.
      substreams: the number of substreams.
      sequences: indices, within a microbatch, of the sequences of this process, in ascending order.
      microbatch_sequences: the number of sequences in a microbatch of the global batch.
      microbatches: the number of microbatches that a batch is accumulated from.
    """

    def __init__(
        self,
        open_substream: Callable[[int], BatchIterator],
        *,
        substreams: int,
        sequences: Sequence[int],
        microbatch_sequences: int,
        microbatches: int = 1,
    ):
        # (substream, index in it) of each sequence of this process, microbatch by microbatch.
        places = [
            _place(microbatch, sequence, substreams, microbatch_sequences, microbatches)
            for microbatch in range(microbatches)
            for sequence in sequences
        ]
        needed = sorted({substream for substream, _ in places})

        self._chosen = (
            np.array([needed.index(substream) for substream, _ in places]),
            np.array([sequence for _, sequence in places]),
        )
        self._substreams = {substream: open_substream(substream) for substream in needed}

    def __iter__(self) -> "SubstreamBatches":
        return self

    def __next__(self) -> Batch[np.ndarray]:
        """Returns this process's sequences of the next batch, microbatch after microbatch."""
        # Every substream advances, and then each sequence is picked from its substream.
        batches = [next(substream) for substream in self._substreams.values()]
        return jax.tree.map(lambda *feature: np.stack(feature)[self._chosen], *batches)

    def state(self) -> dict[str, Any]:
        """Returns the positions of this process's substreams.

        The state of the whole stream is the union of these over all processes.
        """
        return {"lanes": {str(number): substream.state() for number, substream in self._substreams.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to the position after the batch at which the state of the whole stream was taken.

        Raises:
          UserError: the state is from a different stream.
        """
        states = _substream_states(state)
        # A substream without a saved state gets another one's; the identity check then reports the difference.
        for number, substream in self._substreams.items():
            substream.restore(states.get(str(number), next(iter(states.values()))))

    def close(self) -> None:
        """Stops the prefetching threads of all substreams."""
        for substream in self._substreams.values():
            substream.close()


def _place(
    microbatch: int, sequence: int, substreams: int, microbatch_sequences: int, microbatches: int
) -> tuple[int, int]:
    """Returns the substream of a sequence of a microbatch, and its index among the sequences of that substream."""
    # `width` sequences of each microbatch come from each substream.
    width, rest = divmod(microbatch_sequences, substreams)
    if not rest:
        return sequence // width, microbatch * width + sequence % width
    return divmod(sequence * microbatches + microbatch, microbatch_sequences * microbatches // substreams)


def _substream_states(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the state of each substream by its number, as a string."""
    # "lanes" is the name of substreams in saved states. Versions without them saved the state of a single stream.
    return state.get("lanes", {"0": state})
