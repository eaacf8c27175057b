"""The request for a prepared corpus, and its division into units of work.

The division is a pure function of the files, independent of the number of workers.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from looplm_jax.codec import differences, from_dict
from looplm_jax.config import OnBadRecord, ReadLimits, RecordKind, SourceConfig
from looplm_jax.corpus._format import MANIFEST, PLAN, SHARD, SIGNATURES, UNFINISHED, CorpusSpec, PreparedFolder, as_json
from looplm_jax.data._documents import Document
from looplm_jax.data._examples import tokens_and_mask
from looplm_jax.data.sources import BadRecordPolicy, Input, Inputs, Span, find_inputs, spans
from looplm_jax.data.sources._discovery import find_files
from looplm_jax.data.sources._source import format_of
from looplm_jax.data.tokenizers import FolderTokenizer, JsonTokenizer, Tokenizer
from looplm_jax.errors import UserError

# The work that is lost when a worker is killed, and the granularity of progress.
UNIT_BYTES = 64 * 2**20
_FILES_AT_ONCE = 16  # reading footers of remote files is dominated by latency

_TOKENIZER_FILES = {JsonTokenizer.kind: "tokenizer.json", FolderTokenizer.kind: "tokenizer_folder.json"}
_LEFT_BEHIND = (UNFINISHED, f"{PLAN}.new")  # files left by a process that was killed before it wrote anything else


# Units


@dataclasses.dataclass(frozen=True)
class FileSpan:
    """Documents that are read in one pass: a file, or a span of one.

    Attributes:
      file: the file.
      source: the source of the file.
      span: the span to read.
      bytes: the approximate size of the span, in the file's own, possibly compressed, bytes.
    """

    file: Input
    source: SourceConfig
    span: Span
    bytes: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """The work of one job: a span of a large file, or several small files."""

    file_spans: tuple[FileSpan, ...]

    @property
    def bytes(self) -> int:
        """The approximate size of the unit, in bytes of its files."""
        return sum(file_span.bytes for file_span in self.file_spans)


@dataclasses.dataclass(frozen=True)
class LocatedDocument:
    """A document, its source, its file, and its position in the file."""

    source: str
    file: str
    place: tuple[int, int]
    document: Document


def find_all_inputs(sources: Iterable[SourceConfig], limits: ReadLimits | None = None) -> dict[SourceConfig, Inputs]:
    """Returns the files of every source. Raises UserError for the same reasons as `find_inputs`."""
    return {source: find_inputs(source.path, source, limits) for source in sources}


def divide(
    sources: Iterable[SourceConfig], unit_bytes: int = UNIT_BYTES, found: Mapping[SourceConfig, Inputs] | None = None
) -> tuple[Unit, ...]:
    """Divides all files of the sources into units of about `unit_bytes`.

    Args:
      sources: the sources, in order.
      unit_bytes: the approximate size of a unit.
      found: the result of `find_all_inputs`, if it was called before.
    """
    found = found or find_all_inputs(sources)
    pairs = [(file, source) for source in sources for file in found[source]]

    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        file_spans = threads.map(lambda pair: _file_spans(pair[0], pair[1], unit_bytes), pairs)
        return tuple(_together((file_span for file in file_spans for file_span in file), unit_bytes))


def documents(unit: Unit, bad: BadRecordPolicy) -> Iterator[LocatedDocument]:
    """Yields the documents of a unit, in order, in one pass. Raises UserError for the same reasons as `scan`."""
    for file_span in unit.file_spans:
        for found in format_of(file_span.file).scan(file_span.file, file_span.source, bad, file_span.span):
            yield LocatedDocument(file_span.source.path, file_span.file.name, found.place, found.document)


# Description of the input


def describe_inputs(units: Sequence[Unit]) -> str:
    """Returns a short description of the files, with a digest of names, sizes and spans.

    Equal texts mean equal work.
    """
    file_spans = [file_span for unit in units for file_span in unit.file_spans]
    # Sizes and spans are included, because they decide which documents are in which shard.
    cuts = [
        f"{file_span.file.name}\n{file_span.span.start}\n{file_span.span.end}\n{file_span.bytes}"
        for file_span in file_spans
    ]
    digest = hashlib.blake2b(os.fsencode("\n".join(cuts)), digest_size=8).hexdigest()
    files, size = len({file_span.file.name for file_span in file_spans}), sum(unit.bytes for unit in units)
    return f"{files} files, {size} bytes, digest {digest}"


def digest_contents(units: Sequence[Unit]) -> str:
    """Returns a digest that changes when any file changes, even if its size stays the same.

    Local files are read completely. For others, the version that the store reports is used.
    """
    files = {file_span.file.name: file_span.file for unit in units for file_span in unit.file_spans}
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        digests = threads.map(lambda file: file.digest(), files.values())
        return hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()


def _file_spans(file: Input, source: SourceConfig, unit_bytes: int) -> list[FileSpan]:
    """Returns the spans of a file. Its bytes are attributed in proportion to the length of each span."""
    # Spans count bytes, records or row groups, depending on the format, hence the proportion.
    found, size = spans(file, unit_bytes), file.size
    total = max(found[-1].end - found[0].start, 1) if found else 1
    return [FileSpan(file, source, span, size * (span.end - span.start) // total) for span in found]


def _together(file_spans: Iterable[FileSpan], unit_bytes: int) -> Iterator[Unit]:
    """Groups consecutive spans into units of at most `unit_bytes`, or of a single span."""
    held: list[FileSpan] = []
    for file_span in file_spans:
        # Consecutive spans only, so that documents stay in the order of the files.
        if held and sum(other.bytes for other in held) + file_span.bytes > unit_bytes:
            yield Unit(tuple(held))
            held = []
        held.append(file_span)
    if held:
        yield Unit(tuple(held))


# Requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """A request to prepare a corpus.

    Attributes:
      sources: files of documents. Their weights are ignored.
      tokenizer: tokenizes the documents.
      sequence_length: positions in a sequence.
      validation_fraction: the fraction of documents to hold out.
      on_bad_record: how to treat records that cannot be read.
      decontaminate: evaluation files; documents that overlap with one of their items are left out.
      ngram: the number of consecutive words that make an overlap.
      near_duplicates: documents at least this similar to an earlier one are left out; 0 keeps all.
      unit_bytes: the approximate amount of input that a worker processes at a time.
      limits: limits on reading.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: Tokenizer
    sequence_length: int
    validation_fraction: float
    on_bad_record: OnBadRecord = OnBadRecord.STOP
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13
    near_duplicates: float = 0.0
    unit_bytes: int = UNIT_BYTES
    limits: ReadLimits = dataclasses.field(default_factory=ReadLimits)

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise UserError(f"--sequence-length must be at least 1, not {self.sequence_length}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"--validation-fraction must be in [0, 1), not {self.validation_fraction}")
        if any(source.kind is RecordKind.CHAT for source in self.sources):
            tokens_and_mask((), self.tokenizer)  # raises UserError if the tokenizer has no chat tokens


# The spec


def make_spec(config: PrepareConfig, units: Sequence[Unit]) -> CorpusSpec:
    """Returns the spec of a corpus, without the digest of the input files, which `with_digest_of_contents` adds.

    The policy for bad records is not in the spec: a bad record either stops the command or is skipped, so the bytes
    that are written do not depend on the policy.
    """
    # Fingerprints and digests instead of contents: specs are compared, and printed where they differ.
    return CorpusSpec(
        sources=config.sources,
        input=describe_inputs(units),
        units=len(units),
        tokenizer_kind=config.tokenizer.kind,
        tokenizer=config.tokenizer.fingerprint,
        vocab_size=config.tokenizer.vocab_size,
        sequence_length=config.sequence_length,
        validation_fraction=config.validation_fraction,
        decontaminate=_describe_evaluations(config),
        near_duplicates=config.near_duplicates,
    )


def with_digest_of_contents(folder: PreparedFolder, spec: CorpusSpec, units: Sequence[Unit]) -> CorpusSpec:
    """Returns the spec with a digest of the input files' content. Local files are read completely.

    Raises:
      UserError: the folder was prepared from files with the same sizes but different content.
    """
    spec = dataclasses.replace(spec, contents=digest_contents(units))

    saved = _read_spec(folder) if PLAN in folder.names() and is_begun(folder) else spec
    if saved.contents not in ("", spec.contents):  # specs from before this field existed have no digest
        raise UserError(
            f"{folder.path} was prepared from files that have changed since, although their sizes have not; choose "
            "another --out"
        )

    return spec


# The folder


def check_folder(folder: PreparedFolder, spec: CorpusSpec) -> None:
    """Checks that a folder is empty, or was started with the same spec, apart from the content digest. Writes nothing.

    Raises:
      UserError: the folder holds the work of another command (the differences are listed), or unrelated files.
    """
    names = folder.names()

    if PLAN not in names:
        if names.difference(_LEFT_BEHIND):
            raise UserError(f"{folder.path} is not empty and holds no prepared corpus; choose another --out")
        return

    if not is_begun(folder):
        return  # a spec without any output may be replaced

    saved = _read_spec(folder)
    # Contents are compared later, because their digest reads all files.
    changed = differences(dataclasses.replace(saved, contents=""), dataclasses.replace(spec, contents=""))
    if changed:
        raise UserError(
            f"{folder.path} is prepared by another command ({'; '.join(map(str, changed))}: there, here); "
            "give the same, or choose another --out"
        )


def is_begun(folder: PreparedFolder) -> bool:
    """Whether the folder has output that took time to produce. From then on, the folder is reserved for its spec."""
    made = (MANIFEST, SIGNATURES)
    return any(name in made or name.endswith(SHARD) for name in folder.names())


def claim_folder(folder: PreparedFolder, spec: CorpusSpec, tokenizer: Tokenizer) -> str:
    """Writes the spec and the tokenizer, which are known before any work. Returns the file name of the tokenizer."""
    # Reports of units may be left from another spec that never produced a shard.
    if not is_begun(folder):
        folder.remove_folder("units")

    # The spec comes first: a folder with a tokenizer and no spec would be refused as unrelated.
    name = _TOKENIZER_FILES.get(spec.tokenizer_kind, "tokenizer.model")
    folder.write(PLAN, as_json(spec))
    folder.write(name, tokenizer.serialize())
    return name


def _read_spec(folder: PreparedFolder) -> CorpusSpec:
    """Reads the spec of a folder. Raises UserError if it is damaged."""
    try:
        return from_dict(CorpusSpec, json.loads(folder.read(PLAN)))
    except ValueError as error:
        raise UserError(f"{folder.at(PLAN)} is damaged ({error}); choose another --out") from None


def _describe_evaluations(config: PrepareConfig) -> str:
    """Returns a short description of the evaluation files, with a digest of their content."""
    files = [file for pattern in config.decontaminate for file in find_files(pattern, by_content=False).files]
    if not files:
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(hashlib.blake2b(file.read()).digest())
    return f"{config.ngram} words, {len(files)} files, digest {digest.hexdigest()}"
