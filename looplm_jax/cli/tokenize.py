"""The work of `looplm tokenize`: shows progress, stops cleanly on a signal, and reports what was written."""

import os
import signal
import time
from types import FrameType

from rich.progress import DownloadColumn, TextColumn, TimeElapsedColumn

from looplm_jax.corpus._format import Manifest, PreparedFolder
from looplm_jax.corpus._prepare import prepare
from looplm_jax.corpus._reader import open_prepared, verify
from looplm_jax.corpus._work_units import PrepareConfig
from looplm_jax.corpus._worker_pool import Progress as Advance
from looplm_jax.files import quoted
from looplm_jax.recipes import named_recipe
from looplm_jax.terminal import print_error, show, stop_signals
from looplm_jax.training._progress import ProgressBar, progress_console, time_left


class _Stopped(BaseException):
    """A signal asked the command to stop."""

    def __init__(self, number: signal.Signals):
        self.number = number


def prepare_corpus(order: PrepareConfig, out: str, workers: int | None) -> int:
    """Prepares a corpus. Returns the exit status: 128 + n if signal n stopped it."""
    # The exception unwinds through `prepare`, which stops its workers.
    before = {number: signal.signal(number, _stop) for number in stop_signals()}

    try:
        with _TokenizeProgress() as progress:
            # Tokenizing keeps a core busy, so more workers than cores would only wait.
            workers = workers or os.cpu_count() or 1
            manifest = prepare(order, out, workers=workers, watcher=progress, say=progress.say)
    except _Stopped as stopped:
        number = stopped.number
        print_error(f"stopped by {number.name}; the same command resumes there")
        return 128 + number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    _print_summary(manifest, out)
    return 0


def verify_corpus(out: str) -> int:
    """Reads every shard again. Returns 2 if one is damaged."""
    # Unlike the check at the start of a training run, every byte is read.
    corpus = open_prepared(out)
    damage = verify(corpus)
    for line in damage:
        print_error(str(line))

    if not damage:
        manifest = corpus.manifest
        size = sum(shard.bytes for shard in manifest.shards)
        print(f"{out} is intact: {len(manifest.shards)} shards, {size:,} bytes, as they were written")

    return 2 if damage else 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Handles a signal by raising `_Stopped` in the main thread."""
    del frame
    raise _Stopped(signal.Signals(number))


def _print_summary(manifest: Manifest, out: str) -> None:
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
    command = ["looplm", "train", "--data", quoted(out)]

    # Only fields that the corpus dictates; the rest of the recipe is the user's choice.
    if any(stage.sequence_length != plan.sequence_length for stage in recipe.stages):
        command += ["--stage.sequence_length", str(plan.sequence_length)]
    if recipe.model.max_positions < plan.sequence_length:
        command += ["--model.max_positions", str(plan.sequence_length)]
    if recipe.model.vocab_size != plan.vocab_size:
        command += ["--model.vocab_size", str(plan.vocab_size)]

    return " ".join(command)


# Progress


class _TokenizeProgress(ProgressBar):
    """Documents, tokens, text per second and time left, over all work units of a pass."""

    def __init__(self) -> None:
        super().__init__(progress_console(), DownloadColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn())
        self._what = ""
        self._total = self._done = self._before = 0
        self._documents = self._tokens = self._bytes = 0
        self._started = 0.0

    def begin(self, what: str, *, bytes: int, done: int) -> None:
        """Starts a pass over all work units: `bytes` of files in total, `done` of them finished by earlier runs."""
        self._what, self._total, self._done, self._before = what, bytes, done, done
        self._documents = self._tokens = self._bytes = 0
        self._started = self._last_line = time.monotonic()

        for task in self._bar.task_ids:
            # One bar at a time: passes follow each other.
            self._bar.remove_task(task)
        self._task = self._bar.add_task(what, total=bytes, completed=done, status="")

        again = f", {done:,} of them done before" if done else ""
        self.say(f"{what}: {bytes:,} bytes of files{again}")

    def advance(self, progress: Advance) -> None:
        """Adds the progress of a worker."""
        self._documents += progress.documents
        self._tokens += progress.tokens
        self._bytes += progress.bytes
        self._show()

    def finish_unit(self, bytes: int) -> None:
        """Records that a work unit with this many bytes of files is finished."""
        self._done += bytes
        self._show()

    def _show(self) -> None:
        """Shows how far the pass is."""
        # The clock may not have advanced.
        seconds = max(time.monotonic() - self._started, 1e-9)
        # Unknown before the first finished unit; those of earlier runs say nothing about the speed of this one.
        finished = self._done - self._before
        left = time_left(seconds, done=finished, rest=self._total - self._done) if finished else "?"
        status = (
            f"{self._documents:,} documents  {self._tokens:,} tokens  {self._bytes / seconds / 1e6:.1f} MB/s  "
            f"{left} left"
        )

        self._bar.update(self._task, completed=self._done, status=status)
        self._say_at_intervals(f"{self._what}  {self._done / max(self._total, 1):.0%}  {status}")
