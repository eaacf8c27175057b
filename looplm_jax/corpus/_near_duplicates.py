"""Near-duplicates: texts whose sets of word n-grams are almost the same, found by MinHash.

Candidate pairs come from locality-sensitive hashing. Signatures are divided into bands of equal width, and documents
that agree in all of a band are candidates (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4). Bands
are sorted rather than stored in hash tables, so a document takes 8 bytes per band, and only documents that share a band
with another take more.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

from looplm_jax.corpus._words import words
from looplm_jax.errors import UserError

_SEED = 1
# Bounds the memory of a signature: one value for each permutation and n-gram.
_NGRAMS_AT_ONCE = 4096

_RECALL = 0.95  # fraction of pairs at the threshold that become candidates; candidates are verified, so more is safe
_BAND_SEED = 2
_ROWS_AT_ONCE = 65536


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
                f"near-duplicates: ngram is {self.ngram} and permutations {self.permutations}; both must be at least 1"
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
            # Sorted, so that of equally similar candidates the earliest is chosen.
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
        # The fraction of equal minima is an unbiased estimate of the Jaccard similarity (Broder 1997).
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


# Bands


def band_width(threshold: float, permutations: int) -> int:
    """Returns the largest width at which a pair at the threshold shares a band with probability `_RECALL` or more.

    With b bands of r rows, pairs of similarity s become candidates with probability 1 - (1 - s^r)^b.
    """
    wide_enough = [
        width
        for width in range(1, permutations + 1)
        if 1 - (1 - threshold**width) ** (permutations // width) >= _RECALL
    ]
    return max(wide_enough, default=1)


def shared_bands(signatures: UInt32[np.ndarray, "N P"], threshold: float) -> Iterator[tuple[int, list[int]]]:
    """Yields the documents that share a band with another, in order, each with the numbers of the buckets it shares.

    N is the number of documents and P the number of permutations.
    """
    keys = _band_keys(signatures, band_width(threshold, signatures.shape[1]))
    # A bucket is a band and a value of its hash, encoded as one number.
    documents, buckets = [], []
    for band in range(keys.shape[1]):
        members, groups = _shared(keys[:, band])
        documents.append(members)
        buckets.append(groups * keys.shape[1] + band)

    # Regroup by document; the stable sort keeps the buckets of a document in order of bands.
    all_documents, all_buckets = np.concatenate(documents), np.concatenate(buckets)
    order = np.argsort(all_documents, kind="stable")
    all_documents, all_buckets = all_documents[order], all_buckets[order]

    starts = np.flatnonzero(np.diff(all_documents, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(all_documents)]):
        yield int(all_documents[start]), all_buckets[start:end].tolist()


def _band_keys(signatures: UInt32[np.ndarray, "N P"], width: int) -> UInt64[np.ndarray, "N bands"]:
    """Returns a 64-bit hash of each band of each document."""
    bands = signatures.shape[1] // width
    # Multilinear hashing modulo 2^64, with odd multipliers so that no bit of a value is lost.
    multipliers = np.random.default_rng(_BAND_SEED).integers(2**64, size=width, dtype=np.uint64) | np.uint64(1)

    # Bands are sorted one at a time, so columns are contiguous. Documents are hashed in blocks to bound memory.
    keys = np.empty((len(signatures), bands), np.uint64, order="F")
    for start in range(0, len(signatures), _ROWS_AT_ONCE):
        rows = signatures[start : start + _ROWS_AT_ONCE, : bands * width].astype(np.uint64)
        keys[start : start + _ROWS_AT_ONCE] = rows.reshape(len(rows), bands, width) @ multipliers

    return keys


def _shared(keys: UInt64[np.ndarray, "N"]) -> tuple[Int64[np.ndarray, "M"], Int64[np.ndarray, "M"]]:
    """Returns the M documents whose key is not unique, and for each the number of its key among all distinct keys."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    # The slice handles the empty case.
    first = np.append(True, ordered[1:] != ordered[:-1])[: len(keys)]
    groups = np.cumsum(first)
    inside = np.bincount(groups)[groups] > 1
    return order[inside], groups[inside]
