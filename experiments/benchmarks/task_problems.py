"""CPU time per problem of the synthetic tasks: drawn and packed in blocks, and one by one as before.

    python -m experiments.benchmarks.task_problems

Both streams yield the packed batches of a training run. They alternate in one process; the time is that of all its
threads, the ratio the median over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import grain
import grain.experimental

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.data import BatchIterator, Corpus, open_corpus, train_batches
from looplm_jax.data._packing import pack
from looplm_jax.data._pipeline import READING, mixture
from looplm_jax.data.tokenizers import Tokenizer

_TASKS = {"mano": 256, "addition": 256, "phop": 512, "capo": 512, "reachability": 512, "threehop": 256}
_ROWS = 32
# A round reads at least twice the 4,096 problems among which the stream of single problems shuffles, and at least eight
# blocks of the other stream, which generates two in advance.
_PROBLEMS, _TOKENS = 2 * 4096, 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(argv).rounds

    print("| task | positions of a sequence | one by one | in blocks | ratio | positions in use |")
    print("|---|---|---|---|---|---|")
    for task, length in _TASKS.items():
        corpus = open_corpus(DataConfig(sources=(SourceConfig(path=task),)))
        before, after = _one_by_one(corpus, length), _in_blocks(corpus, length)
        _cost(before, tokens=0), _cost(after, tokens=_TOKENS)  # fills the buffers
        costs = [(_cost(before, tokens=0), _cost(after, tokens=_TOKENS)) for _ in range(rounds)]
        ratio = statistics.median(old / new for old, new in costs)
        old, new = (1e6 * statistics.median(each) for each in zip(*costs, strict=True))

        full = statistics.mean((next(after).segment_ids > 0).mean() for _ in range(20))
        print(f"| {task} | {length} | {old:.1f} us | {new:.1f} us | {ratio:.1f} | {full:.1%} |", flush=True)
        before.close()
        after.close()


def _in_blocks(corpus: Corpus, length: int) -> BatchIterator:
    """Returns the stream that draws and packs problems in blocks."""
    return train_batches(corpus, _tokenizer(corpus), batch_size=_ROWS, sequence_length=length, seed=0)


def _one_by_one(corpus: Corpus, length: int) -> BatchIterator:
    """Returns the stream of runs that started when problems were still drawn one by one."""
    records = mixture(corpus, 0, tokenizer=_tokenizer(corpus)).to_iter_dataset(READING)
    batches = pack(records, length, shuffle_seed=0).batch(_ROWS, drop_remainder=True)
    return BatchIterator(iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4)), {})


def _tokenizer(corpus: Corpus) -> Tokenizer:
    """Returns the tokenizer of a task."""
    assert corpus.own_tokenizer is not None
    return corpus.own_tokenizer


def _cost(batches: BatchIterator, *, tokens: int) -> float:
    """Returns the CPU seconds per problem, over at least `_PROBLEMS` problems and `tokens` tokens."""
    used, problems, read = time.process_time(), 0, 0
    while problems < _PROBLEMS or read < tokens:
        segment_ids = next(batches).segment_ids
        read += segment_ids.size
        # Packed rows number their problems from 1, so the maximum is the count.
        problems += int(segment_ids.max(axis=1).sum())
    return (time.process_time() - used) / problems


if __name__ == "__main__":
    main()
