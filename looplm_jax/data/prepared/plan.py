"""The request for a prepared corpus, the plan made from it, and the check that a folder is free for that plan."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from looplm_jax.codec import differences, from_dict
from looplm_jax.config import OnBadRecord, ReadLimits, RecordKind, SourceConfig
from looplm_jax.data.chat import tokens_and_mask
from looplm_jax.data.prepared.folder import MANIFEST, PLAN, SHARD, SIGNATURES, UNFINISHED, PreparedFolder
from looplm_jax.data.prepared.manifest import Plan, as_json
from looplm_jax.data.prepared.units import UNIT_BYTES, Unit, describe_inputs, digest_contents
from looplm_jax.data.sources.discovery import find_files
from looplm_jax.data.tokenizers import FolderTokenizer, JsonTokenizer, Tokenizer
from looplm_jax.errors import UserError

_TOKENIZER_FILES = {JsonTokenizer.kind: "tokenizer.json", FolderTokenizer.kind: "tokenizer_folder.json"}
_LEFT_BEHIND = (UNFINISHED, f"{PLAN}.new")  # files left by a process that was killed before it wrote anything else


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
