"""Whether a prepared corpus is as it was written."""

import concurrent.futures
import functools

from looplm_jax.data.prepared.manifest import read_tokenizer
from looplm_jax.data.prepared.reading import PreparedCorpus
from looplm_jax.data.prepared.shards import check_shard, damaged
from looplm_jax.errors import UserError

_READS_AT_ONCE = 4


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
