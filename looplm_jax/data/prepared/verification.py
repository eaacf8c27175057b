"""Whether a prepared corpus is as it was written: quickly at every start, or all of it."""

import concurrent.futures
import functools
from collections.abc import Iterable, Sequence

from looplm_jax.data.prepared.manifest import Shard, read_tokenizer
from looplm_jax.data.prepared.reading import PreparedCorpus
from looplm_jax.data.prepared.shards import check_edges, check_shard, damaged
from looplm_jax.errors import UserError

_READS_AT_ONCE = 4
_EDGES_AT_ONCE = 16
_BYTES_AT_START = 2**30


def verify(corpus: PreparedCorpus) -> list[str]:
    """One line for each file that is damaged or missing; every shard is read whole."""
    folder, shards = corpus.folder, corpus.manifest.shards
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        found = zip(shards, threads.map(functools.partial(check_shard, folder), shards), strict=True)
        lines = [str(damaged(folder, shard, why)) for shard, why in found if why is not None]
    try:
        read_tokenizer(folder, corpus.manifest)
    except UserError as error:
        lines.append(str(error))
    return lines


def check_at_start(corpus: PreparedCorpus) -> None:
    """Checks the length and the edges of every shard, and all bytes of as many as make a gigabyte.

    So a corpus of up to a gigabyte is checked whole, and a larger one in a time that grows with its files alone.

    Raises:
      UserError: a shard is missing, damaged, or of another preparation.
    """
    folder, shards = corpus.folder, corpus.manifest.shards
    with concurrent.futures.ThreadPoolExecutor(_EDGES_AT_ONCE) as threads:
        _refuse(corpus, shards, threads.map(functools.partial(check_edges, folder), shards))
    step = max(-(-sum(shard.bytes for shard in shards) // _BYTES_AT_START), 1)
    whole = shards[::step]
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        _refuse(corpus, whole, threads.map(functools.partial(check_shard, folder), whole))


def _refuse(corpus: PreparedCorpus, shards: Sequence[Shard], found: Iterable[str | None]) -> None:
    for shard, why in zip(shards, found, strict=True):
        if why is not None:
            raise damaged(corpus.folder, shard, why)
