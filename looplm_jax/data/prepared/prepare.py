"""Files of documents become a prepared corpus: the story that `looplm tokenize` tells."""

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
    """Sees how far it is."""

    def begin(self, what: str, *, bytes: int, done: int) -> None:
        """A pass over all units begins: so many bytes of files, of which so many were done before."""

    def advance(self, progress: Progress) -> None:
        """A worker did this much."""

    def finish_unit(self, bytes: int) -> None:
        """A unit of so many bytes of files is done."""


def prepare(
    order: Order, out: str, *, workers: int, watcher: Watcher, say: Callable[[str], object] = lambda _: None
) -> Manifest:
    """Writes a prepared corpus, or resumes where an earlier process with the same order stopped.

    The bytes that are written do not depend on the number of workers, nor on where earlier ones were stopped.

    Args:
      order: what to prepare.
      out: the folder, here or at gs://.
      workers: how many processes do it.
      watcher: sees the progress.
      say: gets one line about the files that are read and those that are left out.

    Raises:
      UserError: bad input, a folder with other files or of another order, or a place that refuses.
    """
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
        folder.write(MANIFEST, as_json(manifest))
        folder.remove_folder(SIGNATURES)
        return manifest


def is_complete(folder: PreparedFolder) -> bool:
    """Whether there is a manifest, and every file that it names."""
    names = folder.names()
    return MANIFEST in names and names.issuperset(shard.name for shard in read_manifest(folder).shards)


class _Crew:
    """Workers that go through all units, several times."""

    def __init__(self, units: Sequence[Unit], workers: int, watcher: Watcher):
        self._bytes = sum(unit.bytes for unit in units)
        self._workers, self._watcher = workers, watcher

    def run(self, what: str, work: Callable[..., Any], jobs: Sequence[UnitJob], *, done: frozenset[int]) -> None:
        """Do the jobs whose numbers are not `done`."""
        left = [job for job in jobs if job.number not in done]
        before = self._bytes - sum(job.unit.bytes for job in left)
        self._watcher.begin(what, bytes=self._bytes, done=before)
        with contextlib.closing(run_jobs(work, left, self._workers)) as words:
            for word in words:
                if isinstance(word, Progress):
                    self._watcher.advance(word)
                else:
                    self._watcher.finish_unit(left[word.number].unit.bytes)


def _without_duplicates(
    order: Order, folder: PreparedFolder, crew: _Crew, jobs: Sequence[UnitJob], scratch: Path
) -> tuple[list[UnitJob], DuplicatesReport]:
    settings = NearDuplicates(order.near_duplicates)
    signed = folder.names(SIGNATURES)
    done = frozenset(job.number for job in jobs if signatures_name(job.number).rpartition("/")[2] in signed)
    crew.run("looking for near-duplicates", SignUnit(str(folder.path), settings, order.on_bad_record), jobs, done=done)
    left_out = leave_out(folder, len(jobs), settings, scratch)
    pairs = zip(jobs, left_out.of_unit, strict=True)
    return [UnitJob(job.number, job.unit, numbers) for job, numbers in pairs], left_out.report


def _finished_units(folder: PreparedFolder) -> frozenset[int]:
    """Units whose report is there, and all files that it names."""
    names = folder.names()
    numbers = [int(name.partition(".")[0]) for name in folder.names("units") if name.endswith(".json")]
    reports = zip(numbers, _read_reports(folder, numbers), strict=True)
    return frozenset(
        number
        for number, report in reports
        if names.issuperset(shard.name for shard in report.train + report.validation)
    )


def _read_reports(folder: PreparedFolder, numbers: Iterable[int]) -> list[UnitReport]:
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        return list(threads.map(functools.partial(read_report, folder), numbers))
