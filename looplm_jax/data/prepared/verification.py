"""Verification that a prepared corpus is intact: a quick check at every start, or a check of every byte."""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence

from looplm_jax.data.prepared.folder import PreparedFolder
from looplm_jax.data.prepared.manifest import Shard, read_tokenizer
from looplm_jax.data.prepared.reading import PreparedCorpus
from looplm_jax.data.prepared.shards import check_edges, check_shard, damaged
from looplm_jax.errors import UserError

_READS_AT_ONCE = 4
_EDGES_AT_ONCE = 16
_BYTES_AT_START = 2**30  # bytes of shards that are checked completely at every start


def verify(corpus: PreparedCorpus) -> list[str]:
    """Returns one line for each file that is damaged or missing. Every shard is read completely."""
    folder, shards = corpus.folder, corpus.manifest.shards
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        found = zip(shards, threads.map(functools.partial(check_shard, folder), shards), strict=True)
        lines = [str(damaged(folder, shard, why)) for shard, why in found if why is not None]
    try:
        read_tokenizer(folder, corpus.manifest)
    except UserError as error:
        lines.append(str(error))
    return lines


def check_at_start(corpora: Sequence[PreparedCorpus]) -> None:
    """Checks the size and the edges of every shard, and all bytes of about a gigabyte of shards.

    A mixture of up to a gigabyte is therefore checked completely, and the time for a larger one grows only with the
    number of its files.

    Raises:
      UserError: a shard is missing, damaged, or from another preparation.
    """
    shards = [(corpus, shard) for corpus in corpora for shard in corpus.manifest.shards]
    _refuse(shards, check_edges, _EDGES_AT_ONCE)

    # Evenly spaced shards that add up to about _BYTES_AT_START; all of them if the corpus is smaller.
    step = max(-(-sum(shard.bytes for _, shard in shards) // _BYTES_AT_START), 1)
    _refuse(shards[::step], check_shard, _READS_AT_ONCE)


def _refuse(
    shards: Sequence[tuple[PreparedCorpus, Shard]], check: Callable[[PreparedFolder, Shard], str | None], at_once: int
) -> None:
    """Applies a check to shards concurrently and raises UserError for the first one that fails."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
        found = threads.map(lambda pair: check(pair[0].folder, pair[1]), shards)
        for (corpus, shard), why in zip(shards, found, strict=True):
            if why is not None:
                raise damaged(corpus.folder, shard, why)
