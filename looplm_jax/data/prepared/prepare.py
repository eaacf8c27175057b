"""Preparation of a corpus from files of documents, as done by `looplm tokenize`."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from looplm_jax.data.cleaning import DuplicatesReport, NearDuplicates, load_evaluation_ngrams
from looplm_jax.data.prepared.folder import MANIFEST, SIGNATURES, PreparedFolder
from looplm_jax.data.prepared.manifest import Manifest, as_json, read_manifest
from looplm_jax.data.prepared.plan import Order, check_folder, claim_folder, make_plan, with_contents
from looplm_jax.data.prepared.pool import Progress, run_jobs
from looplm_jax.data.prepared.signatures import SignUnit, leave_out, signatures_name
from looplm_jax.data.prepared.summary import make_manifest, write_cleaning_report
from looplm_jax.data.prepared.unit_report import UnitReport, read_report
from looplm_jax.data.prepared.unit_work import TokenizeUnit, UnitJob
from looplm_jax.data.prepared.units import Unit, cut, find_all
from looplm_jax.data.sources import summarize

_READS_AT_ONCE = 16


class Watcher(Protocol):
    """Receives progress."""

    def begin(self, what: str, *, bytes: int, done: int) -> None:
        """Called when a pass over all units begins, with the total bytes of input and the bytes already done."""

    def advance(self, progress: Progress) -> None:
        """Called when a worker reports progress."""

    def finish_unit(self, bytes: int) -> None:
        """Called when a unit with this many bytes of input is done."""


def prepare(
    order: Order, out: str, *, workers: int, watcher: Watcher, say: Callable[[str], object] = lambda _: None
) -> Manifest:
    """Writes a prepared corpus, or resumes the work of an earlier process with the same order.

    The written bytes depend neither on the number of workers nor on interruptions.

    Args:
      order: what to prepare, and how.
      out: the folder, local or at gs://.
      workers: the number of worker processes.
      watcher: receives progress.
      say: called with one line that lists the numbers of files to read and files left out.

    Raises:
      UserError: the input is bad, the folder has unrelated content, or the file system refuses.
    """
    # Everything that can be checked without writing is checked before the folder is touched.
    folder = PreparedFolder(out)
    ngrams = load_evaluation_ngrams(order.decontaminate, order.ngram) if order.decontaminate else None
    if order.near_duplicates:
        NearDuplicates(order.near_duplicates).check_installed()

    found = find_all(order.sources, order.limits)
    say(summarize(found.values()))
    units = cut(order.sources, order.unit_bytes, found)

    plan = make_plan(order, units)
    check_folder(folder, plan)
    plan = with_contents(folder, plan, units)

    with folder.only_writer() as scratch:
        if is_complete(folder):
            return read_manifest(folder)

        tokenizer_file = claim_folder(folder, plan, order.tokenizer)
        crew = _Crew(units, workers, watcher)
        jobs = [UnitJob(number, unit) for number, unit in enumerate(units)]

        duplicates = None
        if order.near_duplicates:
            jobs, duplicates = _without_duplicates(order, folder, crew, jobs, scratch)

        work = TokenizeUnit(
            plan=plan,
            tokenizer_content=order.tokenizer.serialize(),
            url=out,
            scratch=scratch,
            on_bad_record=order.on_bad_record,
            ngrams=ngrams,
        )
        crew.run("tokenizing", work, jobs, done=_finished_units(folder))

        reports = _read_reports(folder, range(len(units)))
        manifest = make_manifest(plan, tokenizer_file, reports)
        write_cleaning_report(folder, reports, ngrams, duplicates)
        # The manifest is written last: its presence means that the corpus is complete.
        folder.write(MANIFEST, as_json(manifest))
        folder.remove_folder(SIGNATURES)
        return manifest


def is_complete(folder: PreparedFolder) -> bool:
    """Whether the folder has a manifest and every shard that it names."""
    names = folder.names()
    return MANIFEST in names and names.issuperset(shard.name for shard in read_manifest(folder).shards)


# Passes over all units


class _Crew:
    """Workers for one or several passes over all units."""

    def __init__(self, units: Sequence[Unit], workers: int, watcher: Watcher):
        self._bytes = sum(unit.bytes for unit in units)
        self._workers, self._watcher = workers, watcher

    def run(self, what: str, work: Callable[..., Any], jobs: Sequence[UnitJob], *, done: frozenset[int]) -> None:
        """Runs the jobs whose numbers are not in `done`."""
        left = [job for job in jobs if job.number not in done]
        before = self._bytes - sum(job.unit.bytes for job in left)
        self._watcher.begin(what, bytes=self._bytes, done=before)

        # `closing` kills the workers if the loop ends early.
        with contextlib.closing(run_jobs(work, left, self._workers)) as words:
            for word in words:
                if isinstance(word, Progress):
                    self._watcher.advance(word)
                else:
                    self._watcher.finish_unit(left[word.number].unit.bytes)


def _without_duplicates(
    order: Order, folder: PreparedFolder, crew: _Crew, jobs: Sequence[UnitJob], scratch: Path
) -> tuple[list[UnitJob], DuplicatesReport]:
    """Returns the jobs with the near-duplicates to leave out of each unit, and the report about them.

    The signatures of earlier runs are reused.
    """
    settings = NearDuplicates(order.near_duplicates)
    signed = folder.names(SIGNATURES)
    done = frozenset(job.number for job in jobs if signatures_name(job.number).rpartition("/")[2] in signed)
    crew.run("looking for near-duplicates", SignUnit(str(folder.path), settings, order.on_bad_record), jobs, done=done)

    left_out = leave_out(folder, len(jobs), settings, scratch)
    pairs = zip(jobs, left_out.of_unit, strict=True)
    return [UnitJob(job.number, job.unit, numbers) for job, numbers in pairs], left_out.report


def _finished_units(folder: PreparedFolder) -> frozenset[int]:
    """Returns the numbers of units that have a report and all shards that it names."""
    names = folder.names()
    numbers = [int(name.partition(".")[0]) for name in folder.names("units") if name.endswith(".json")]
    reports = zip(numbers, _read_reports(folder, numbers), strict=True)

    # A report does not count if one of its shards was removed, so the unit is done again.
    return frozenset(
        number
        for number, report in reports
        if names.issuperset(shard.name for shard in report.train + report.validation)
    )


def _read_reports(folder: PreparedFolder, numbers: Iterable[int]) -> list[UnitReport]:
    """Reads the reports of units concurrently."""
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        return list(threads.map(functools.partial(read_report, folder), numbers))
