"""Which runs of n words stand in a set of texts, looked up for all places of a document at once."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int64, UInt64

_SPARSENESS = 16  # of 16 flags, at most one is set, so 15 of 16 words of other texts are not searched for
_SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class NgramTable:
    """The places in `words` of evaluation texts at which runs of `length` words begin, grouped by equal runs.

    A run is known by a hash of 64 bits: with 10^6 runs, the chance of a single false match in 10^12 words is 1 in 18.
    """

    length: int
    hashes: UInt64[np.ndarray, "runs"]
    places: Int64[np.ndarray, "places"]
    first_places: Int64[np.ndarray, "runs_and_end"]
    flags: Bool[np.ndarray, "flags"]

    @classmethod
    def of(cls, length: int, hashes: UInt64[np.ndarray, "places"], places: Int64[np.ndarray, "places"]) -> "NgramTable":
        """The table of runs with these hashes at these places."""
        order = np.argsort(hashes, kind="stable")
        unique, first = np.unique(hashes[order], return_index=True)
        flags = np.zeros(1 << int(len(unique) * _SPARSENESS - 1).bit_length(), bool)
        flags[_slots(unique, len(flags))] = True
        return cls(length, unique, places[order], np.append(first, len(places)), flags)

    def find(self, hashes: UInt64[np.ndarray, "windows"]) -> Int64[np.ndarray, "found"]:
        """The places of all runs whose hash is among those of a document's windows, sorted."""
        likely = np.unique(hashes[self.flags[_slots(hashes, len(self.flags))]])
        runs = np.searchsorted(self.hashes, likely)
        runs = runs[self.hashes[np.minimum(runs, len(self.hashes) - 1)] == likely]
        ranges = [self.places[self.first_places[run] : self.first_places[run + 1]] for run in runs]
        return np.sort(np.concatenate([self.places[:0], *ranges]))


def word_values(count: int) -> UInt64[np.ndarray, "words"]:
    """A random number for each of `count` words, always the same."""
    return _random(_SEED, count)


def window_hashes(
    values: UInt64[np.ndarray, "words"], lengths: tuple[int, ...]
) -> dict[int, UInt64[np.ndarray, "windows"]]:
    """For each length, a hash of every run of so many words: a sum of products, modulo 2^64 (multilinear hashing)."""
    found: dict[int, np.ndarray] = {}
    multipliers = _random(_SEED + 1, max(lengths, default=0)) | np.uint64(1)  # odd, so that no bit is lost
    sums = np.zeros_like(values)
    for length, multiplier in enumerate(multipliers, start=1):
        windows = max(len(values) - length + 1, 0)
        sums = sums[:windows] + values[length - 1 :] * multiplier
        if length in lengths:
            found[length] = sums
    return found


def _random(seed: int, count: int) -> UInt64[np.ndarray, "count"]:
    return np.random.default_rng(seed).integers(2**64, size=count, dtype=np.uint64, endpoint=False)


def _slots(hashes: UInt64[np.ndarray, "N"], count: int) -> UInt64[np.ndarray, "N"]:
    return hashes & np.uint64(count - 1)
