"""The cost of cleaning: the speed of a worker, and the memory of the process that searches for near-duplicates.

Workers read the source text of the standard library; evaluation items are passages of 40 words from it. The parent is
measured on signatures of `--documents` documents, one in ten of which is an altered copy of an earlier one.

    python -m experiments.benchmarks.cleaning --documents 1000000
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt32

from looplm_jax.corpus import EvaluationNgrams, NearDuplicates, load_evaluation_ngrams
from looplm_jax.corpus._words import words
from looplm_jax.data import collect_stdlib

_ITEM_WORDS = 40
_ALTERED = 13  # of 128 permutations, those in which a copy differs: a similarity of 0.9


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="signatures that the parent looks at")
    parser.add_argument("--items", type=int, default=10_000, help="items of the evaluation")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        texts = _corpus(Path(folder))
        ngrams = _evaluation(Path(folder), texts, options.items)

    near_duplicates = NearDuplicates()
    print(f"n-grams of {options.items:,} items: {_speed(ngrams.overlap, texts):.1f} MB/s")
    print(f"signatures: {_speed(near_duplicates.signature, texts):.1f} MB/s")
    _measure_parent(near_duplicates, options.documents)


def _corpus(folder: Path) -> list[str]:
    """Returns the documents of the standard library."""
    collect_stdlib(folder / "corpus.jsonl")
    return [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]


def _evaluation(folder: Path, texts: Sequence[str], items: int) -> EvaluationNgrams:
    """Returns the n-grams of passages with every seventh word replaced: common words, but uncommon n-grams."""
    every_word = [word for text in texts for word in words(text)]
    starts = np.random.default_rng(0).integers(len(every_word) - _ITEM_WORDS, size=items)
    passages = [every_word[start : start + _ITEM_WORDS] for start in starts]
    lines = [" ".join("other" if i % 7 == 0 else word for i, word in enumerate(passage)) for passage in passages]
    (folder / "evaluation.txt").write_text("\n".join(lines))
    return load_evaluation_ngrams([str(folder / "evaluation.txt")])


def _speed(worker: Callable[[str], object], texts: Sequence[str]) -> float:
    """Returns the speed of a worker in megabytes of text per second."""
    start = time.perf_counter()
    for text in texts:
        worker(text)
    return sum(len(text.encode()) for text in texts) / (time.perf_counter() - start) / 1e6


def _signatures(count: int, permutations: int) -> UInt32[np.ndarray, "N P"]:
    """Returns random signatures, one in ten of them an altered copy of one of the eight before it."""
    random = np.random.default_rng(1)
    rows = random.integers(2**32, size=(count, permutations), dtype=np.uint32)
    copies = np.arange(9, count, 10)
    rows[copies] = rows[copies - random.integers(1, 9, size=len(copies))]
    rows[np.repeat(copies, _ALTERED), random.integers(permutations, size=_ALTERED * len(copies))] = 0
    return rows


def _measure_parent(near_duplicates: NearDuplicates, documents: int) -> None:
    """Measures the time and the peak memory of the search for near-duplicates."""
    rows = _signatures(documents, near_duplicates.permutations)

    start = time.perf_counter()
    duplicates = near_duplicates.drop(rows)
    seconds = time.perf_counter() - start
    # Traced in a second pass, because tracing slows the allocations down.
    tracemalloc.start()
    near_duplicates.drop(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    print(f"{len(duplicates.kept):,} of {documents:,} documents dropped in {seconds:.1f} s")
    print(f"signatures {rows.nbytes / 1e6:,.0f} MB, beside them at most {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
