"""The manifest of a prepared corpus: its shards, the plan that produced them, and the records that were left out."""

import dataclasses
import hashlib
import json
from typing import Any

from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import SourceConfig
from looplm_jax.data.prepared.folder import MANIFEST, PreparedFolder
from looplm_jax.data.tokenizers import Tokenizer, deserialize
from looplm_jax.errors import UserError
from looplm_jax.files import AnyPath

VERSION = 1  # of the format


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One ArrayRecord file of packed sequences.

    Attributes:
      name: the file name, in the folder.
      rows: the number of sequences.
      tokens: the number of positions that are not padding.
      documents: the number of documents.
      bytes: the size of the file.
      digest: BLAKE2b of the file, in hexadecimal.
      edges: BLAKE2b of the first and last 4 KiB, which are checked at every start; empty in manifests from before this
        field existed.
    """

    name: str
    rows: int
    tokens: int
    documents: int
    bytes: int
    digest: str
    edges: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceCount:
    """The number of documents read from a source, including those that were left out later, and their UTF-8 bytes."""

    path: str
    documents: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The numbers of records that were left out, by reason, and of chunks without a target out of all chunks."""

    bad_records: int = 0
    first_bad_record: str = ""
    overlapping: int = 0
    near_duplicates: int = 0
    pieces_without_target: int = 0
    pieces: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that determines the bytes of a prepared corpus. Two commands with equal plans write the same files."""

    version: int = VERSION
    sources: tuple[SourceConfig, ...]
    input: str
    units: int
    tokenizer_kind: str
    tokenizer: str  # the fingerprint
    vocab_size: int
    sequence_length: int
    validation_fraction: float
    decontaminate: str = ""  # a description of the evaluation files and of the n-grams
    near_duplicates: float = 0.0
    contents: str = ""  # digest of the input files' content; empty in plans from before this field existed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a complete prepared corpus."""

    plan: Plan
    tokenizer_file: str
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    sources: tuple[SourceCount, ...]
    left_out: LeftOut

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, for training and validation."""
        return self.train + self.validation

    @property
    def rows(self) -> int:
        """The number of training sequences."""
        return sum(shard.rows for shard in self.train)

    @property
    def tokens(self) -> int:
        """The number of training positions, without padding."""
        return sum(shard.tokens for shard in self.train)

    @property
    def digest(self) -> str:
        """A hex digest that changes when any sequence changes, or when their order changes."""
        shards = "".join(f"{shard.rows}:{shard.digest};" for shard in self.shards)
        what = f"{self.plan.sequence_length};{self.plan.tokenizer};{shards}"
        return hashlib.blake2b(what.encode(), digest_size=8).hexdigest()


# Reading and writing


def read_manifest(folder: PreparedFolder) -> Manifest:
    """Reads the manifest of a folder.

    Raises:
      UserError: there is no manifest, it is damaged, or another version of the format was used.
    """
    name = folder.at(MANIFEST)
    try:
        values = json.loads(folder.read(MANIFEST))
    except FileNotFoundError:
        raise UserError(f"{folder.path} holds no prepared corpus; `looplm tokenize` makes one") from None
    except ValueError as error:
        raise _damaged(name, error) from None

    version = values.get("plan", {}).get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(f"{name} is of version {version}, and this is version {VERSION}; prepare the corpus again")

    try:
        manifest = from_dict(Manifest, values)
    except UserError as error:
        raise _damaged(name, error) from None

    # `at` rejects names that lead out of the folder.
    for file in (manifest.tokenizer_file, *(shard.name for shard in manifest.shards)):
        folder.at(file)

    return manifest


def read_tokenizer(folder: PreparedFolder, manifest: Manifest) -> Tokenizer:
    """Reads the tokenizer of a prepared corpus. Raises UserError if its file is missing or has another fingerprint."""
    name = folder.at(manifest.tokenizer_file)
    try:
        tokenizer = deserialize(manifest.plan.tokenizer_kind, folder.read(manifest.tokenizer_file))
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file; copy the folder again") from None
    if tokenizer.fingerprint != manifest.plan.tokenizer:
        raise UserError(f"{name} is not the tokenizer of the manifest; copy the folder again")
    return tokenizer


def as_json(value: Any) -> bytes:
    """Returns a plan, a report or a manifest as the content of a JSON file."""
    return (json.dumps(to_dict(value), indent=1) + "\n").encode()


def _damaged(name: AnyPath, error: Exception) -> UserError:
    """Returns the error for an unreadable manifest."""
    return UserError(f"{name} is damaged ({error}); run the same `looplm tokenize` command again to write it anew")
