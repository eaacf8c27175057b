"""The work of `looplm inspect`: shows the steps of a checkpoint, or the manifest of a prepared corpus."""

import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from looplm_jax.codec import to_dict
from looplm_jax.corpus._format import Manifest, Shard, is_prepared
from looplm_jax.corpus._reader import open_prepared
from looplm_jax.files import quoted
from looplm_jax.terminal import literal, print_error, show

if TYPE_CHECKING:
    from looplm_jax.checkpoints import StepReport


def show_contents(path: str, *, step: int | None, as_json: bool) -> int:
    """Prints the contents of a folder. Returns 2 if a step is damaged or cannot be checked."""
    return _show_prepared(path, as_json=as_json) if is_prepared(path) else _show_steps(path, step, as_json=as_json)


# Checkpoints


def _show_steps(path: str, step: int | None, *, as_json: bool) -> int:
    """Prints the steps, each checked against its digests. Returns 2 if one is damaged or cannot be checked."""
    # Imported here, because it loads JAX, which a prepared corpus does not need.
    from looplm_jax.checkpoints import inspect_steps

    reports = inspect_steps(path, step=step)
    if as_json:
        print(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        _print_steps(path, reports)

    # On standard error, so that the JSON stays valid.
    invalid = [report for report in reports if report.problem]
    for report in invalid:
        print_error(f"step {report.step} {report.problem}")
    return 2 if invalid else 0


def _print_steps(path: str, reports: "list[StepReport]") -> None:
    """Prints one row per step, latest first, and the configuration of the latest readable one."""
    table = Table("step", "stage", "parameters", "bytes", "kept", "state")

    for report in reversed(reports):
        stage = report.metadata.extra.get("stage", "") if report.metadata else ""
        kept = "always" if report.permanent else "while new"
        state = "[red]damaged" if report.damage else "[yellow]unknown" if report.unknown else "[green]valid"
        sizes = f"{report.parameters:,}", f"{report.bytes:,}"
        table.add_row(str(report.step), literal(stage), *sizes, kept, state)
    Console(highlight=False).print(table)

    # Reports are ordered from the newest step to the oldest.
    latest = next((report.metadata for report in reports if report.metadata), None)
    if latest is not None:
        model = ", ".join(f"{name}={value}" for name, value in latest.config["model"].items())
        show(f"recipe {latest.config['name']}: {model}")
        show(f"tokenizer {latest.tokenizer_kind}, sha256 {latest.tokenizer_fingerprint[:16]}…")
    show(f"next: looplm evaluate {quoted(path)}")


# Prepared corpora


def _show_prepared(path: str, *, as_json: bool) -> int:
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
        f"{_in_parentheses(plan.decontaminate)}, {left_out.near_duplicates:,} near-duplicates"
    )
    show(f"next: looplm tokenize --verify --out {quoted(path)}")
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


def _in_parentheses(text: str) -> str:
    """Returns the text in parentheses, or nothing if it is empty."""
    return f" ({text})" if text else ""
