"""What a command will do, and whether a folder is the place for it."""

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
_LEFT_BEHIND = (UNFINISHED, f"{PLAN}.new")  # by a process that was killed in its first moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What to prepare, and how.

    Attributes:
      sources: files of documents; their weights mean nothing here.
      tokenizer: makes tokens of them.
      sequence_length: positions of a row.
      validation_fraction: share of the documents that is held out.
      on_bad_record: what a record that cannot be read does.
      decontaminate: files of evaluation items, of which nothing may stand in a document that is kept.
      ngram: words in a row that must be the same.
      near_duplicates: the least similarity to an earlier document at which one is left out; 0: all are kept.
      unit_bytes: about how much a worker does at a time.
      limits: what a file may ask for.
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
            tokens_and_mask((), self.tokenizer)  # refuses a tokeniser that has no tokens for chats


def make_plan(order: Order, units: Sequence[Unit]) -> Plan:
    """Returns everything that fixes the bytes but the contents of the files, which `with_contents` adds.

    A bad record stops a command or is left out; no bytes depend on it.
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
    """Returns the plan with a digest of the contents of the files, for which local ones are read whole.

    Raises:
      UserError: what the folder holds was prepared from files of equal sizes and other contents.
    """
    plan = dataclasses.replace(plan, contents=digest_contents(units))
    saved = _read_plan(folder) if PLAN in folder.names() and is_begun(folder) else plan
    if saved.contents not in ("", plan.contents):  # plans from before there was a digest have none
        raise UserError(
            f"{folder.path} was prepared from files that have changed since, although their sizes have not; choose "
            "another --out"
        )
    return plan


def check_folder(folder: PreparedFolder, plan: Plan) -> None:
    """Refuses a folder in which there is something else, whatever the files contain. Nothing is written.

    Raises:
      UserError: it holds what another command prepares (the differences are named), or files of another kind.
    """
    names = folder.names()
    if PLAN not in names:
        if names.difference(_LEFT_BEHIND):
            raise UserError(f"{folder.path} is not empty and holds no prepared corpus; choose another --out")
        return
    if not is_begun(folder):
        return  # what failed before its first row was written gives way
    saved = _read_plan(folder)
    changed = differences(dataclasses.replace(saved, contents=""), dataclasses.replace(plan, contents=""))
    if changed:
        raise UserError(
            f"{folder.path} is prepared by another command ({'; '.join(changed)}: there, here); "
            "give the same, or choose another --out"
        )


def is_begun(folder: PreparedFolder) -> bool:
    """Whether anything is there that took time to make: from then on the folder belongs to its plan."""
    made = (MANIFEST, SIGNATURES)
    return any(name in made or name.endswith(SHARD) for name in folder.names())


def claim_folder(folder: PreparedFolder, plan: Plan, tokenizer: Tokenizer) -> str:
    """Write what is known before the first unit; returns the name of the tokeniser's file."""
    if not is_begun(folder):
        folder.remove_folder("units")
    name = _TOKENIZER_FILES.get(plan.tokenizer_kind, "tokenizer.model")
    folder.write(PLAN, as_json(plan))
    folder.write(name, tokenizer.serialize())
    return name


def _read_plan(folder: PreparedFolder) -> Plan:
    try:
        return from_dict(Plan, json.loads(folder.read(PLAN)))
    except ValueError as error:
        raise UserError(f"{folder.at(PLAN)} is damaged ({error}); choose another --out") from None


def _describe_evaluations(order: Order) -> str:
    """The evaluation files in a few words, with a digest of what is in them."""
    files = [file for pattern in order.decontaminate for file in find_files(pattern, by_content=False).files]
    if not files:
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(hashlib.blake2b(file.read()).digest())
    return f"{order.ngram} words, {len(files)} files, digest {digest.hexdigest()}"
