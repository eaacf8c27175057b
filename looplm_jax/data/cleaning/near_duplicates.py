"""Near-duplicates: texts whose sets of word n-grams are almost the same, found by MinHash."""

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt32

from looplm_jax.data.cleaning.bands import shared_bands
from looplm_jax.data.cleaning.words import words
from looplm_jax.errors import UserError

_SEED = 1
_NGRAMS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """The documents to drop. `kept[i]` is the kept document of which document i is a near-duplicate."""

    documents: int
    kept: dict[int, int]

    @property
    def dropped(self) -> frozenset[int]:
        """The numbers of the dropped documents."""
        return frozenset(self.kept)


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Drops documents that are similar to an earlier one (Broder 1997; Lee et al. 2022, "Deduplicating").

    Attributes:
      threshold: the Jaccard similarity of two texts' n-gram sets from which the later text is dropped. It is estimated
        by the fraction of permutations under which both have the same minimal n-gram.
      ngram: the number of words in an n-gram.
      permutations: the number of permutations, P. A signature takes 4 bytes for each.
    """

    threshold: float = 0.8
    ngram: int = 5
    permutations: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"near-duplicates: threshold is {self.threshold}; give a similarity above 0, at most 1")
        if self.ngram < 1 or self.permutations < 1:
            raise UserError(
                f"near-duplicates: ngram is {self.ngram} and permutations {self.permutations}; both begin at 1"
            )

    def check_installed(self) -> None:
        """Raises UserError if the package that computes signatures is not installed."""
        _library()

    def signature(self, text: str) -> UInt32[np.ndarray, "P"]:
        """Returns the MinHash of a text, the same in every process and on every machine.

        Raises UserError without datasketch.
        """
        minhash = _empty_minhash(self.permutations).copy()
        ngrams = list(_ngrams(text, self.ngram))
        for start in range(0, len(ngrams), _NGRAMS_AT_ONCE):
            minhash.update_batch(ngrams[start : start + _NGRAMS_AT_ONCE])
        return minhash.hashvalues

    def drop(self, signatures: UInt32[np.ndarray, "N P"]) -> Duplicates:
        """Returns which documents are similar to an earlier one that is kept.

        The result depends on the order of documents.

        Args:
          signatures: the signatures of all N documents, in order. It may be a memory map, which is read a few rows at a
            time.
        """
        kept: dict[int, int] = {}
        # The kept documents in each bucket. Only they are candidates, so the first document represents a cluster.
        keepers: dict[int, list[int]] = {}

        for document, buckets in shared_bands(signatures, self.threshold):
            candidates = sorted({keeper for bucket in buckets for keeper in keepers.get(bucket, ())})
            alike = self._most_alike(signatures, document, candidates)
            if alike is not None:
                kept[document] = alike
                continue

            for bucket in buckets:
                keepers.setdefault(bucket, []).append(document)

        return Duplicates(documents=len(signatures), kept=kept)

    def _most_alike(self, signatures: UInt32[np.ndarray, "N P"], document: int, candidates: list[int]) -> int | None:
        """Returns the most similar candidate, or None if none reaches the threshold."""
        if not candidates:
            return None
        similarity = np.mean(signatures[candidates] == signatures[document], axis=1)
        best = int(np.argmax(similarity))
        return candidates[best] if similarity[best] >= self.threshold else None


# N-grams and hashing


def _ngrams(text: str, n: int) -> Iterator[bytes]:
    """Returns the distinct n-grams of a text.

    A shorter text is one n-gram; for a text without words, it is the text itself.
    """
    found = words(text)
    if not found:
        return iter((text.encode(),))

    # N-grams are slices of the joined text: `ends` are the byte offsets after each word and its space.
    joined = " ".join(found).encode()
    ends = np.cumsum([len(word.encode()) + 1 for word in found])
    last = max(len(found) - n, 0)
    starts = [0, *ends[:last].tolist()]
    stops = (ends[min(n, len(found)) - 1 :] - 1).tolist()

    return iter({joined[start:stop]: None for start, stop in zip(starts, stops)})


@functools.cache
def _empty_minhash(permutations: int) -> Any:
    """Returns a MinHash without values, cached so that its permutations are generated only once."""
    return _library().MinHash(num_perm=permutations, seed=_SEED, hashfunc=zlib.crc32, scheme="affine32")


def _library() -> Any:
    """Returns the `datasketch` module. Raises UserError if it is not installed."""
    try:
        import datasketch
    except ImportError:
        raise UserError("near-duplicates need datasketch; pip install 'looplm_jax[clean]'") from None
    return datasketch
