"""Runs `looplm tokenize`: shows progress, stops cleanly on a signal, and reports what was written."""

import os
import signal
from types import FrameType

from looplm_jax.cli.tokenize_progress import TokenizeProgress
from looplm_jax.data.prepared.folder import PreparedFolder
from looplm_jax.data.prepared.manifest import Manifest
from looplm_jax.data.prepared.plan import Order
from looplm_jax.data.prepared.prepare import prepare
from looplm_jax.data.prepared.reading import open_prepared
from looplm_jax.data.prepared.verification import verify
from looplm_jax.files import pasted
from looplm_jax.printing import complain, show
from looplm_jax.recipes import named_recipe
from looplm_jax.stop_signals import stop_signals


class _Stopped(BaseException):
    """A signal asked the command to stop."""

    def __init__(self, number: signal.Signals):
        self.number = number


def prepare_corpus(order: Order, out: str, workers: int | None) -> int:
    """Prepares a corpus. Returns the exit status: 128 + n if signal n stopped it."""
    # The exception unwinds through `prepare`, which stops its workers.
    before = {number: signal.signal(number, _stop) for number in stop_signals()}

    try:
        with TokenizeProgress() as progress:
            workers = workers or os.cpu_count() or 1
            manifest = prepare(order, out, workers=workers, watcher=progress, say=progress.say)
    except _Stopped as stopped:
        number = stopped.number
        complain(f"stopped by {number.name}; the same command goes on from there")
        return 128 + number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    _say_what_was_written(manifest, out)
    return 0


def verify_corpus(out: str) -> int:
    """Reads every shard again. Returns 2 if one is damaged."""
    corpus = open_prepared(out)
    damage = verify(corpus)
    for line in damage:
        complain(str(line))

    if not damage:
        manifest = corpus.manifest
        size = sum(shard.bytes for shard in manifest.shards)
        print(f"{out} is sound: {len(manifest.shards)} shards, {size:,} bytes, as they were written")

    return 2 if damage else 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Handles a signal by raising `_Stopped` in the main thread."""
    del frame
    raise _Stopped(signal.Signals(number))


def _say_what_was_written(manifest: Manifest, out: str) -> None:
    """Prints the totals, what was left out, and the command to run next."""
    documents = sum(source.documents for source in manifest.sources)
    # Fraction of positions that are tokens, not padding.
    used = manifest.tokens / (manifest.rows * manifest.plan.sequence_length)
    held_out = sum(shard.rows for shard in manifest.validation)

    print(
        f"{documents:,} documents became {manifest.tokens:,} tokens in {manifest.rows:,} rows of "
        f"{manifest.plan.sequence_length}, {used:.1%} full, and {held_out:,} rows held out"
    )

    left_out = manifest.left_out
    if left_out.bad_records:
        show(f"left out: {left_out.bad_records:,} bad records, the first {left_out.first_bad_record}")
    if left_out.overlapping or left_out.near_duplicates:
        print(
            f"left out: {left_out.overlapping:,} documents that overlap evaluations, {left_out.near_duplicates:,} "
            "near-duplicates; cleaning.md says more"
        )
    if left_out.pieces_without_target:
        print(
            f"left out: {left_out.pieces_without_target:,} of {left_out.pieces:,} pieces of chats "
            f"({left_out.pieces_without_target / left_out.pieces:.1%}), in which the assistant says nothing"
        )

    folder = PreparedFolder(out)
    show(f"wrote {len(manifest.train)} shards to train on, {len(manifest.validation)} held out, to {folder.path}")
    show(f"next: {_next_command(manifest, out)}")


def _next_command(manifest: Manifest, out: str) -> str:
    """Returns a command that trains the default recipe on the corpus, with the fields that have to differ."""
    recipe, plan = named_recipe("text-small"), manifest.plan
    command = ["looplm", "train", "--data", pasted(out)]

    if any(stage.sequence_length != plan.sequence_length for stage in recipe.stages):
        command += ["--stage.sequence_length", str(plan.sequence_length)]
    if recipe.model.max_positions < plan.sequence_length:
        command += ["--model.max_positions", str(plan.sequence_length)]
    if recipe.model.vocab_size != plan.vocab_size:
        command += ["--model.vocab_size", str(plan.vocab_size)]

    return " ".join(command)
