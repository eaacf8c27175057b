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
from looplm_jax.corpus._format import MANIFEST, PLAN, SHARD, SIGNATURES, UNFINISHED, Plan, PreparedFolder, as_json
from looplm_jax.data._documents import Document
from looplm_jax.data._examples import tokens_and_mask
from looplm_jax.data.sources import BadRecordPolicy, Input, Inputs, Span, find_inputs, spans
from looplm_jax.data.sources._discovery import find_files
from looplm_jax.data.sources._source import format_of
from looplm_jax.data.tokenizers import FolderTokenizer, JsonTokenizer, Tokenizer
from looplm_jax.errors import UserError

UNIT_BYTES = 64 * 2**20
_FILES_AT_ONCE = 16  # reading footers of remote files is dominated by latency

_TOKENIZER_FILES = {JsonTokenizer.kind: "tokenizer.json", FolderTokenizer.kind: "tokenizer_folder.json"}
_LEFT_BEHIND = (UNFINISHED, f"{PLAN}.new")  # files left by a process that was killed before it wrote anything else


# Units


@dataclasses.dataclass(frozen=True)
class Part:
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

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """The approximate size of the unit, in bytes of its files."""
        return sum(part.bytes for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A document, its source, its file, and its position in the file."""

    source: str
    file: str
    place: tuple[int, int]
    document: Document


def find_all(sources: Iterable[SourceConfig], limits: ReadLimits | None = None) -> dict[SourceConfig, Inputs]:
    """Returns the files of every source. Raises UserError for the same reasons as `find_inputs`."""
    return {source: find_inputs(source.path, source, limits) for source in sources}


def cut(
    sources: Iterable[SourceConfig], unit_bytes: int = UNIT_BYTES, found: Mapping[SourceConfig, Inputs] | None = None
) -> tuple[Unit, ...]:
    """Divides all files of the sources into units of about `unit_bytes`.

    Args:
      sources: the sources, in order.
      unit_bytes: the approximate size of a unit.
      found: the result of `find_all`, if it was called before.
    """
    found = found or find_all(sources)
    pairs = [(file, source) for source in sources for file in found[source]]

    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        parts = threads.map(lambda pair: _parts(pair[0], pair[1], unit_bytes), pairs)
        return tuple(_together((part for file in parts for part in file), unit_bytes))


def documents(unit: Unit, bad: BadRecordPolicy) -> Iterator[Placed]:
    """Yields the documents of a unit, in order, in one pass. Raises UserError for the same reasons as `scan`."""
    for part in unit.parts:
        for found in format_of(part.file).scan(part.file, part.source, bad, part.span):
            yield Placed(part.source.path, part.file.name, found.place, found.document)


# Description of the input


def describe_inputs(units: Sequence[Unit]) -> str:
    """Returns a short description of the files, with a digest of names, sizes and spans.

    Equal texts mean equal work.
    """
    parts = [part for unit in units for part in unit.parts]
    cuts = [f"{part.file.name}\n{part.span.start}\n{part.span.end}\n{part.bytes}" for part in parts]
    digest = hashlib.blake2b(os.fsencode("\n".join(cuts)), digest_size=8).hexdigest()
    files, size = len({part.file.name for part in parts}), sum(unit.bytes for unit in units)
    return f"{files} files, {size} bytes, digest {digest}"


def digest_contents(units: Sequence[Unit]) -> str:
    """Returns a digest that changes when any file changes, even if its size stays the same.

    Local files are read completely. For others, the version that the store reports is used.
    """
    files = {part.file.name: part.file for unit in units for part in unit.parts}
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        digests = threads.map(lambda file: file.digest(), files.values())
        return hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()


def _parts(file: Input, source: SourceConfig, unit_bytes: int) -> list[Part]:
    """Returns the spans of a file. Its bytes are attributed in proportion to the length of each span."""
    found, size = spans(file, unit_bytes), file.size
    total = max(found[-1].end - found[0].start, 1) if found else 1
    return [Part(file, source, span, size * (span.end - span.start) // total) for span in found]


def _together(parts: Iterable[Part], unit_bytes: int) -> Iterator[Unit]:
    """Groups consecutive parts into units of at most `unit_bytes`, or of a single part."""
    held: list[Part] = []
    for part in parts:
        if held and sum(other.bytes for other in held) + part.bytes > unit_bytes:
            yield Unit(tuple(held))
            held = []
        held.append(part)
    if held:
        yield Unit(tuple(held))


# Requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
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


# The plan


def make_plan(order: Order, units: Sequence[Unit]) -> Plan:
    """Returns the plan of an order, without the digest of the input files' content, which `with_contents` adds.

    The policy for bad records is not part of the plan: a bad record either stops the command or is left out, so the
    bytes that are written do not depend on the policy.
    """
    return Plan(
        sources=order.sources,
        input=describe_inputs(units),
        units=len(units),
        tokenizer_kind=order.tokenizer.kind,
        tokenizer=order.tokenizer.fingerprint,
        vocab_size=order.tokenizer.vocab_size,
        sequence_length=order.sequence_length,
        validation_fraction=order.validation_fraction,
        decontaminate=_describe_evaluations(order),
        near_duplicates=order.near_duplicates,
    )


def with_contents(folder: PreparedFolder, plan: Plan, units: Sequence[Unit]) -> Plan:
    """Returns the plan with a digest of the input files' content. Local files are read completely.

    Raises:
      UserError: the folder was prepared from files with the same sizes but different content.
    """
    plan = dataclasses.replace(plan, contents=digest_contents(units))
    saved = _read_plan(folder) if PLAN in folder.names() and is_begun(folder) else plan
    if saved.contents not in ("", plan.contents):  # plans from before this field existed have no digest
        raise UserError(
            f"{folder.path} was prepared from files that have changed since, although their sizes have not; choose "
            "another --out"
        )

    return plan


# The folder


def check_folder(folder: PreparedFolder, plan: Plan) -> None:
    """Checks that a folder is empty, or was started with the same plan, apart from the content digest. Writes nothing.

    Raises:
      UserError: the folder holds the work of another command (the differences are listed), or unrelated files.
    """
    names = folder.names()

    if PLAN not in names:
        if names.difference(_LEFT_BEHIND):
            raise UserError(f"{folder.path} is not empty and holds no prepared corpus; choose another --out")
        return

    if not is_begun(folder):
        return  # a plan without any output may be replaced

    saved = _read_plan(folder)
    changed = differences(dataclasses.replace(saved, contents=""), dataclasses.replace(plan, contents=""))
    if changed:
        raise UserError(
            f"{folder.path} is prepared by another command ({'; '.join(map(str, changed))}: there, here); "
            "give the same, or choose another --out"
        )


def is_begun(folder: PreparedFolder) -> bool:
    """Whether the folder has output that took time to produce. From then on, the folder is reserved for its plan."""
    made = (MANIFEST, SIGNATURES)
    return any(name in made or name.endswith(SHARD) for name in folder.names())


def claim_folder(folder: PreparedFolder, plan: Plan, tokenizer: Tokenizer) -> str:
    """Writes the plan and the tokenizer, which are known before any work. Returns the file name of the tokenizer."""
    # Reports of units may be left from another plan that never produced a shard.
    if not is_begun(folder):
        folder.remove_folder("units")
    name = _TOKENIZER_FILES.get(plan.tokenizer_kind, "tokenizer.model")
    folder.write(PLAN, as_json(plan))
    folder.write(name, tokenizer.serialize())
    return name


def _read_plan(folder: PreparedFolder) -> Plan:
    """Reads the plan of a folder. Raises UserError if it is damaged."""
    try:
        return from_dict(Plan, json.loads(folder.read(PLAN)))
    except ValueError as error:
        raise UserError(f"{folder.at(PLAN)} is damaged ({error}); choose another --out") from None


def _describe_evaluations(order: Order) -> str:
    """Returns a short description of the evaluation files, with a digest of their content."""
    files = [file for pattern in order.decontaminate for file in find_files(pattern, by_content=False).files]
    if not files:
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(hashlib.blake2b(file.read()).digest())
    return f"{order.ngram} words, {len(files)} files, digest {digest.hexdigest()}"
