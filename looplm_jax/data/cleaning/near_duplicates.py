"""Near-duplicates: texts whose sets of n-grams of words are almost the same, found by MinHash."""

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
    """Which of `documents` documents are left out. `kept[i]` is the document that stands for document i."""

    documents: int
    kept: dict[int, int]

    @property
    def dropped(self) -> frozenset[int]:
        """Numbers of the documents that are left out."""
        return frozenset(self.kept)


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Leaves out documents that are like an earlier one (Broder 1997; Lee et al. 2022, "Deduplicating").

    Attributes:
      threshold: the least Jaccard similarity, of the sets of n-grams of two texts, at which the later one is left out.
        It is estimated by the share of permutations under which both have the same least n-gram.
      ngram: words of an n-gram.
      permutations: how many; a signature has 4 bytes for each.
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
        """Raises UserError when the library that makes signatures is missing."""
        _library()

    def signature(self, text: str) -> UInt32[np.ndarray, "P"]:
        """The MinHash of a text, the same in every process and on every machine. Raises UserError: no datasketch."""
        minhash = _empty_minhash(self.permutations).copy()
        ngrams = list(_ngrams(text, self.ngram))
        for start in range(0, len(ngrams), _NGRAMS_AT_ONCE):
            minhash.update_batch(ngrams[start : start + _NGRAMS_AT_ONCE])
        return minhash.hashvalues

    def drop(self, signatures: UInt32[np.ndarray, "N P"]) -> Duplicates:
        """Which documents are like an earlier one that is kept; the result depends on their order and nothing else.

        Args:
          signatures: of all documents in order; it may be a memory map, of which only rows are read at a time.
        """
        kept: dict[int, int] = {}
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
        if not candidates:
            return None
        similarity = np.mean(signatures[candidates] == signatures[document], axis=1)
        best = int(np.argmax(similarity))
        return candidates[best] if similarity[best] >= self.threshold else None


def _ngrams(text: str, n: int) -> Iterator[bytes]:
    """The n-grams of a text, each once; of a shorter text, all of it; of a text without words, the text itself."""
    found = words(text)
    if not found:
        return iter((text.encode(),))
    joined = " ".join(found).encode()
    ends = np.cumsum([len(word.encode()) + 1 for word in found])
    last = max(len(found) - n, 0)
    starts = [0, *ends[:last].tolist()]
    stops = (ends[min(n, len(found)) - 1 :] - 1).tolist()
    return iter({joined[start:stop]: None for start, stop in zip(starts, stops)})


@functools.cache
def _empty_minhash(permutations: int) -> Any:
    return _library().MinHash(num_perm=permutations, seed=_SEED, hashfunc=zlib.crc32, scheme="affine32")


def _library() -> Any:
    try:
        import datasketch
    except ImportError:
        raise UserError("near-duplicates need datasketch; pip install 'looplm_jax[clean]'") from None
    return datasketch
