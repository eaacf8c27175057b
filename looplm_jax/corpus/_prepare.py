"""Preparation of a corpus from files of documents, as done by `looplm tokenize`."""

import concurrent.futures
import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from looplm_jax import json_io
from looplm_jax.corpus._decontamination import EvaluationNgrams, Findings, load_evaluation_ngrams
from looplm_jax.corpus._format import (
    MANIFEST,
    SIGNATURES,
    CorpusSpec,
    LeftOut,
    Manifest,
    PreparedFolder,
    SourceCount,
    as_json,
    read_manifest,
)
from looplm_jax.corpus._near_duplicates import NearDuplicates
from looplm_jax.corpus._reports import DecontaminationReport, DuplicatesReport
from looplm_jax.corpus._signatures import SignUnit, leave_out, signatures_name
from looplm_jax.corpus._work_units import (
    PrepareConfig,
    Unit,
    check_folder,
    claim_folder,
    divide,
    find_all_inputs,
    make_spec,
    with_digest_of_contents,
)
from looplm_jax.corpus._worker import TokenizeUnit, UnitJob, UnitReport, read_report
from looplm_jax.corpus._worker_pool import Progress, run_jobs
from looplm_jax.data.sources import summarize
from looplm_jax.errors import UserError

# Reports are small files, so reading them from a bucket is dominated by latency.
_READS_AT_ONCE = 16

REPORT = "cleaning"  # .json and .md


@runtime_checkable
class Watcher(Protocol):
    """Receives progress."""

    def begin(self, what: str, *, bytes: int, done: int) -> None:
        """Called when a pass over all units begins, with the total bytes of input and the bytes already done."""

    def advance(self, progress: Progress) -> None:
        """Called when a worker reports progress."""

    def finish_unit(self, bytes: int) -> None:
        """Called when a unit with this many bytes of input is done."""


def prepare(
    config: PrepareConfig, out: str, *, workers: int, watcher: Watcher, say: Callable[[str], object] = lambda _: None
) -> Manifest:
    """Writes a prepared corpus, or resumes the work of an earlier process with the same configuration.

    The written bytes depend neither on the number of workers nor on interruptions.

    Args:
      config: what to prepare, and how.
      out: the folder, local or at gs://.
      workers: the number of worker processes.
      watcher: receives progress.
      say: called with one line that lists the numbers of files to read and files left out.

    Raises:
      UserError: the input is bad, the folder has unrelated content, or the file system refuses.
    """
    # Everything that can be checked without writing is checked before the folder is touched.
    folder = PreparedFolder(out)
    ngrams = load_evaluation_ngrams(config.decontaminate, config.ngram) if config.decontaminate else None
    if config.near_duplicates:
        NearDuplicates(config.near_duplicates).check_installed()

    found = find_all_inputs(config.sources, config.limits)
    say(summarize(found.values()))
    units = divide(config.sources, config.unit_bytes, found)

    spec = make_spec(config, units)
    check_folder(folder, spec)
    spec = with_digest_of_contents(folder, spec, units)

    with folder.only_writer() as scratch:
        # The same command on a finished corpus changes nothing.
        if is_complete(folder):
            return read_manifest(folder)

        tokenizer_file = claim_folder(folder, spec, config.tokenizer)
        pool = _WorkerPool(units, workers, watcher)
        jobs = [UnitJob(number, unit) for number, unit in enumerate(units)]

        # Duplicates may be in different units, so all signatures are needed before the first unit is tokenized.
        duplicates = None
        if config.near_duplicates:
            jobs, duplicates = _without_duplicates(config, folder, pool, jobs, scratch)

        work = TokenizeUnit(
            spec=spec,
            tokenizer_content=config.tokenizer.serialize(),
            url=out,
            scratch=scratch,
            on_bad_record=config.on_bad_record,
            ngrams=ngrams,
        )
        pool.run("tokenizing", work, jobs, done=_finished_units(folder))

        # Also of units that earlier processes finished.
        reports = _read_reports(folder, range(len(units)))
        manifest = make_manifest(spec, tokenizer_file, reports)
        write_cleaning_report(folder, reports, ngrams, duplicates)
        # The manifest is written last: its presence means that the corpus is complete.
        folder.write(MANIFEST, as_json(manifest))
        # They are needed only to resume.
        folder.remove_folder(SIGNATURES)
        return manifest


def is_complete(folder: PreparedFolder) -> bool:
    """Whether the folder has a manifest and every shard that it names."""
    names = folder.names()
    return MANIFEST in names and names.issuperset(shard.name for shard in read_manifest(folder).shards)


# Passes over all units


class _WorkerPool:
    """Workers for one or several passes over all units."""

    def __init__(self, units: Sequence[Unit], workers: int, watcher: Watcher):
        self._bytes = sum(unit.bytes for unit in units)
        self._workers, self._watcher = workers, watcher

    def run(self, what: str, work: Callable[..., Any], jobs: Sequence[UnitJob], *, done: frozenset[int]) -> None:
        """Runs the jobs whose numbers are not in `done`."""
        # Units that an earlier process finished are not done again.
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
    config: PrepareConfig, folder: PreparedFolder, pool: _WorkerPool, jobs: Sequence[UnitJob], scratch: Path
) -> tuple[list[UnitJob], DuplicatesReport]:
    """Returns the jobs with the near-duplicates to leave out of each unit, and the report about them.

    The signatures of earlier runs are reused.
    """
    settings = NearDuplicates(config.near_duplicates)
    signed = folder.names(SIGNATURES)
    done = frozenset(job.number for job in jobs if signatures_name(job.number).rpartition("/")[2] in signed)
    pool.run("looking for near-duplicates", SignUnit(str(folder.path), settings, config.on_bad_record), jobs, done=done)

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


# Results of all units together


def make_manifest(spec: CorpusSpec, tokenizer_file: str, reports: Sequence[UnitReport]) -> Manifest:
    """Returns the manifest of all units, in order.

    Raises:
      UserError: a source has no text, or no sequence is left for training.
    """
    left_out = _left_out(reports)
    manifest = Manifest(
        plan=spec,
        tokenizer_file=tokenizer_file,
        train=tuple(shard for report in reports for shard in report.train),
        validation=tuple(shard for report in reports for shard in report.validation),
        sources=_source_counts(spec, reports),
        left_out=left_out,
    )

    # Refused now, and not at the first step of a training run on another machine.
    for source in manifest.sources:
        if source.documents == 0:
            skipped = f" ({left_out.bad_records} bad records were left out)" if left_out.bad_records else ""
            raise UserError(f"{source.path} holds no text{skipped}; give files with text in them")

    if not manifest.train:
        documents = sum(source.documents for source in manifest.sources)
        raise UserError(
            f"of {documents} documents none is left to train on ({sum(s.documents for s in manifest.validation)} held "
            f"out, {left_out.overlapping} overlapping, {left_out.near_duplicates} near-duplicates); choose another "
            "--out, and give more or hold out less"
        )

    return manifest


def write_cleaning_report(
    folder: PreparedFolder,
    reports: Sequence[UnitReport],
    ngrams: EvaluationNgrams | None,
    duplicates: DuplicatesReport | None,
) -> None:
    """Writes the documents that were left out, and the reasons, as JSON and as Markdown.

    Nothing is written if neither overlaps nor near-duplicates were searched for.
    """
    found: dict[str, DecontaminationReport | DuplicatesReport] = {}

    if ngrams is not None:
        findings = Findings()
        for report in reports:
            findings.merge(Findings.from_json(json.loads(report.findings)))
        found["decontamination"] = DecontaminationReport.of(ngrams.n, ngrams.files, findings)

    if duplicates is not None:
        found["near_duplicates"] = duplicates

    if found:
        values = {name: report.to_json() for name, report in found.items()}
        folder.write(f"{REPORT}.json", (json_io.dumps(values, indent=1) + "\n").encode())
        pages = [report.to_markdown() for report in found.values()]
        folder.write(f"{REPORT}.md", "\n".join(["# What was left out", "", *pages]).encode())


def _source_counts(spec: CorpusSpec, reports: Sequence[UnitReport]) -> tuple[SourceCount, ...]:
    """Returns the counts of each source, summed over units."""
    documents: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for source in (source for report in reports for source in report.sources):
        documents[source.path] += source.documents
        sizes[source.path] += source.bytes
    # In the order of the command, each once, including sources without a document.
    paths = dict.fromkeys(source.path for source in spec.sources)
    return tuple(SourceCount(path=path, documents=documents[path], bytes=sizes[path]) for path in paths)


def _left_out(reports: Sequence[UnitReport]) -> LeftOut:
    """Returns the records left out, summed over units, and the first bad record of all."""
    parts = [report.left_out for report in reports]
    return LeftOut(
        bad_records=sum(part.bad_records for part in parts),
        first_bad_record=next((part.first_bad_record for part in parts if part.first_bad_record), ""),
        overlapping=sum(part.overlapping for part in parts),
        near_duplicates=sum(part.near_duplicates for part in parts),
        pieces_without_target=sum(part.pieces_without_target for part in parts),
        pieces=sum(part.pieces for part in parts),
    )
