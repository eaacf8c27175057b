"""Shows a prepared corpus for `looplm inspect`: its manifest, in readable form."""

import json

from rich.console import Console
from rich.table import Table

from looplm_jax.codec import to_dict
from looplm_jax.data.prepared.manifest import Manifest, Shard
from looplm_jax.data.prepared.reading import open_prepared
from looplm_jax.files import pasted
from looplm_jax.printing import literal, show


def show_prepared(path: str, *, as_json: bool) -> int:
    """Prints the manifest of a folder without reading any rows. Returns the exit status."""
    manifest = open_prepared(path).manifest
    if as_json:
        print(json.dumps({**to_dict(manifest), "digest": manifest.digest}, indent=2))
        return 0

    console = Console(highlight=False)
    console.print(_rows(manifest))
    console.print(_sources(manifest))

    plan, left_out = manifest.plan, manifest.left_out
    show(f"tokenizer {plan.tokenizer_kind} of {plan.vocab_size:,} tokens, sha256 {plan.tokenizer[:16]}…")
    show(f"held out: {plan.validation_fraction:.2%} of the documents; digest {manifest.digest}")
    show(
        f"left out: {left_out.bad_records:,} bad records, {left_out.overlapping:,} overlapping evaluations"
        f"{_in_brackets(plan.decontaminate)}, {left_out.near_duplicates:,} near-duplicates"
    )
    show(f"next: looplm tokenize --verify --out {pasted(path)}")
    return 0


def _rows(manifest: Manifest) -> Table:
    """Returns the table of the training and validation rows."""
    table = Table("part", "shards", "rows", "positions", "tokens", "documents", "bytes")
    for name, shards in (("train", manifest.train), ("validation", manifest.validation)):
        table.add_row(name, f"{len(shards):,}", *_totals(shards, manifest.plan.sequence_length))
    return table


def _totals(shards: tuple[Shard, ...], length: int) -> list[str]:
    """Returns the totals of shards: rows, positions, tokens, documents and bytes."""
    rows = sum(shard.rows for shard in shards)
    tokens = sum(shard.tokens for shard in shards)
    documents = sum(shard.documents for shard in shards)
    size = sum(shard.bytes for shard in shards)
    return [f"{number:,}" for number in (rows, rows * length, tokens, documents, size)]


def _sources(manifest: Manifest) -> Table:
    """Returns the table of sources."""
    table = Table("source", "documents read", "bytes of text")
    for source in manifest.sources:
        table.add_row(literal(source.path), f"{source.documents:,}", f"{source.bytes:,}")
    return table


def _in_brackets(text: str) -> str:
    """Returns the text in parentheses, or nothing if it is empty."""
    return f" ({text})" if text else ""
