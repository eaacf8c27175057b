"""The stream of batches, and its exact state."""

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

PROBLEMS = "problems"  # how problems of tasks are drawn: in blocks, or one by one where a saved place does not say
_SPECIAL_TOKENS = ".special_tokens"  # newer than many saved places in the data, so it counts only where it is set


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a stream of batches and this process's share of it."""

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
        """Rows of a batch that this process holds."""
        return self.batch_size // self.process_count


class Stream(Protocol):
    """Features of batch after batch, as Grain gives them."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """Those of the next batch."""

    def get_state(self) -> Any:
        """The place after it, as plain JSON values."""

    def set_state(self, state: Any) -> None:
        """Continue there."""

    def close(self) -> None:
        """Stop reading ahead."""


class BatchIterator:
    """An endless stream of batches, read ahead, that can be taken up again exactly where it was.

    Args:
      batches: the stream.
      identity: what fixes its order.
      one_by_one: opens the stream of versions that drew problems of tasks one by one, for places that they saved.
    """

    def __init__(self, batches: Stream, identity: Mapping[str, Any], *, one_by_one: Callable[[], Stream] | None = None):
        self._identity = dict(identity)
        self._one_by_one = one_by_one
        self._held = [batches]
        # Grain's threads must be gone before the interpreter takes its modules apart, also where nobody calls `close`.
        self._close = weakref.finalize(self, _close, self._held)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        return as_batch(next(self._held[0]))

    def state(self) -> dict[str, Any]:
        """Where the stream is after the batch handed out last: a few hundred bytes of plain JSON values."""
        return {"identity": dict(self._identity), "position": copy.deepcopy(self._held[0].get_state())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch that `state` was taken at, bit for bit.

        Raises:
          UserError: the state belongs to other data, another tokeniser or another geometry; every difference is named.
        """
        saved = state["identity"]
        identity, reopen = self._identity, None
        if self._one_by_one is not None and PROBLEMS not in saved:
            identity, reopen = {key: value for key, value in identity.items() if key != PROBLEMS}, self._one_by_one
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
        """Stop the prefetching threads; nothing else can be asked of the stream afterwards."""
        self._close()


def _close(held: list[Stream]) -> None:
    held.pop().close()


def stream_identity(corpus: Corpus, tokenizer: Tokenizer, geometry: Geometry, seed: int) -> dict[str, Any]:
    """Everything that fixes the order of tokens, as plain JSON values; two streams that share it are equal."""
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
