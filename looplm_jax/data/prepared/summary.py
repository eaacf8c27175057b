"""The results of all units together: the manifest, and the report about documents that cleaning left out."""

import json
from collections import Counter
from collections.abc import Sequence

from looplm_jax import json_io
from looplm_jax.data.cleaning import DecontaminationReport, DuplicatesReport, EvaluationNgrams, Findings
from looplm_jax.data.prepared.folder import PreparedFolder
from looplm_jax.data.prepared.manifest import LeftOut, Manifest, Plan, SourceCount
from looplm_jax.data.prepared.unit_report import UnitReport
from looplm_jax.errors import UserError

REPORT = "cleaning"  # .json and .md


def make_manifest(plan: Plan, tokenizer_file: str, reports: Sequence[UnitReport]) -> Manifest:
    """Returns the manifest of all units, in order.

    Raises:
      UserError: a source has no text, or no sequence is left for training.
    """
    left_out = _left_out(reports)
    manifest = Manifest(
        plan=plan,
        tokenizer_file=tokenizer_file,
        train=tuple(shard for report in reports for shard in report.train),
        validation=tuple(shard for report in reports for shard in report.validation),
        sources=_sources(plan, reports),
        left_out=left_out,
    )

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


def _sources(plan: Plan, reports: Sequence[UnitReport]) -> tuple[SourceCount, ...]:
    """Returns the counts of each source, summed over units."""
    documents: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for source in (source for report in reports for source in report.sources):
        documents[source.path] += source.documents
        sizes[source.path] += source.bytes
    paths = dict.fromkeys(source.path for source in plan.sources)
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
