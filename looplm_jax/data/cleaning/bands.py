"""Locality-sensitive hashing: candidate pairs of similar documents, from the bands of their MinHash signatures.

Signatures are divided into bands of equal width. Documents that agree in all of a band are candidates (Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", 3.4). Bands are sorted rather than stored in hash tables, so a
document takes 8 bytes per band, and only documents that share a band with another take more.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

_RECALL = 0.95  # fraction of pairs at the threshold that become candidates; candidates are verified, so more is safe
_SEED = 2
_ROWS_AT_ONCE = 65536


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
    multipliers = np.random.default_rng(_SEED).integers(2**64, size=width, dtype=np.uint64) | np.uint64(1)

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
