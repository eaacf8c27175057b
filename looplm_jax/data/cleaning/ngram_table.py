"""A hash table of word n-grams, with lookups for all positions of a document at once."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int64, UInt64

_SPARSENESS = 16  # flags per run: at most 1 in 16 is set, so at least 15 of 16 windows of unrelated text need no search
_SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class NgramTable:
    """The positions in `words` of evaluation texts at which runs of `length` words begin, grouped by equal runs.

    Runs are identified by 64-bit hashes: with 10^6 runs, the probability of any false match in 10^12 words is 1 in 18.

    Attributes:
      length: the number of words in a run.
      hashes: the hashes of the distinct runs, sorted.
      places: the positions of all runs, grouped by run.
      first_places: the positions of run i are `places[first_places[i]:first_places[i + 1]]`.
      flags: a table indexed by the low bits of a hash; false means that no run has these bits.
    """

    length: int
    hashes: UInt64[np.ndarray, "runs"]
    places: Int64[np.ndarray, "places"]
    first_places: Int64[np.ndarray, "runs_and_end"]
    flags: Bool[np.ndarray, "flags"]

    @classmethod
    def of(cls, length: int, hashes: UInt64[np.ndarray, "places"], places: Int64[np.ndarray, "places"]) -> "NgramTable":
        """Returns the table of runs with these hashes at these positions."""
        order = np.argsort(hashes, kind="stable")
        unique, first = np.unique(hashes[order], return_index=True)

        # The number of flags is a power of two, so that `_slots` is a bit mask.
        flags = np.zeros(1 << int(len(unique) * _SPARSENESS - 1).bit_length(), bool)
        flags[_slots(unique, len(flags))] = True

        return cls(length, unique, places[order], np.append(first, len(places)), flags)

    def find(self, hashes: UInt64[np.ndarray, "windows"]) -> Int64[np.ndarray, "found"]:
        """Returns the sorted positions of all runs whose hash is among those of a document's windows."""
        likely = np.unique(hashes[self.flags[_slots(hashes, len(self.flags))]])

        # The flags have false positives, so hashes are compared exactly. The index is clipped for hashes after the
        # last.
        runs = np.searchsorted(self.hashes, likely)
        runs = runs[self.hashes[np.minimum(runs, len(self.hashes) - 1)] == likely]

        ranges = [self.places[self.first_places[run] : self.first_places[run + 1]] for run in runs]
        return np.sort(np.concatenate([self.places[:0], *ranges]))


def word_values(count: int) -> UInt64[np.ndarray, "words"]:
    """Returns a pseudorandom number for each of `count` words. The numbers are always the same."""
    return _random(_SEED, count)


def window_hashes(
    values: UInt64[np.ndarray, "words"], lengths: tuple[int, ...]
) -> dict[int, UInt64[np.ndarray, "windows"]]:
    """Returns, for each length, the hash of every run of that many words.

    The hash is a sum of products modulo 2^64 (multilinear hashing).
    """
    found: dict[int, np.ndarray] = {}
    multipliers = _random(_SEED + 1, max(lengths, default=0)) | np.uint64(1)  # odd, so that no bit is lost

    # Each step extends all windows by one word, so all lengths cost one pass of the longest.
    sums = np.zeros_like(values)
    for length, multiplier in enumerate(multipliers, start=1):
        windows = max(len(values) - length + 1, 0)
        sums = sums[:windows] + values[length - 1 :] * multiplier
        if length in lengths:
            found[length] = sums

    return found


def _random(seed: int, count: int) -> UInt64[np.ndarray, "count"]:
    """Returns `count` pseudorandom 64-bit numbers."""
    return np.random.default_rng(seed).integers(2**64, size=count, dtype=np.uint64, endpoint=False)


def _slots(hashes: UInt64[np.ndarray, "N"], count: int) -> UInt64[np.ndarray, "N"]:
    """Returns the low bits of hashes as indices into a table of `count` flags, a power of two."""
    return hashes & np.uint64(count - 1)
