"""The batch iterator: an endless stream of batches with an exact, serializable position."""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from looplm_jax.codec import leaves
from looplm_jax.data.corpus import Corpus
from looplm_jax.data.packing import Batch, as_batch
from looplm_jax.data.tokenizers.base import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.resume import may_differ

PROBLEMS = "problems"  # identity key: how task problems are drawn; states saved before it existed mean one at a time
_SPECIAL_TOKENS = ".special_tokens"  # newer than many saved states, so it is part of the identity only if set


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
    def rows(self) -> int:
        """The number of sequences of a batch that this process holds."""
        return self.batch_size // self.process_count


class Stream(Protocol):
    """A stream of batches, each a dictionary of arrays named as Grain names packed features."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """Returns the features of the next batch."""

    def get_state(self) -> Any:
        """Returns the position after the last returned batch, as plain JSON values."""

    def set_state(self, state: Any) -> None:
        """Moves the stream to a position returned by `get_state`."""

    def close(self) -> None:
        """Stops prefetching."""


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

    def __next__(self) -> Batch:
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

        # Compare the union of the keys, because either version may have fields that the other lacks.
        changed = [
            f"{key}: {saved.get(key)!r} then, {identity.get(key)!r} now"
            for key in {**saved, **identity}
            if saved.get(key) != identity.get(key) and not may_differ(key)
        ]
        if changed:
            raise UserError(
                f"the saved place in the data belongs to another set-up ({'; '.join(changed)}); "
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
        if leaf.value or not leaf.path.endswith(_SPECIAL_TOKENS)
    }

    return {
        **config,
        "documents": [part.train_documents for part in corpus.parts],
        "content": corpus.digest,
        "tokenizer": tokenizer.fingerprint,
        "seed": seed,
        **dataclasses.asdict(geometry),
        **({PROBLEMS: "blocks"} if corpus.tasks else {}),
    }
