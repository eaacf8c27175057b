"""What a prepared corpus is: shards of rows, how they were made, and what was left out."""

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

VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One ArrayRecord file of rows.

    Attributes:
      name: the file, in the folder.
      rows: how many it holds.
      tokens: positions of these rows that are no padding.
      documents: how many were packed into it.
      bytes: length of the file.
      digest: BLAKE2b of the file, in hexadecimal.
      edges: the same of its first and last 4 KiB, which are read at every start; empty in a manifest written before
        there was such a digest.
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
    """What a source gave: documents read, those kept included, and their text in UTF-8."""

    path: str
    documents: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Records that are not in any row, and why; and pieces of chats without a target, of how many pieces."""

    bad_records: int = 0
    first_bad_record: str = ""
    overlapping: int = 0
    near_duplicates: int = 0
    pieces_without_target: int = 0
    pieces: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that fixes the bytes of a prepared corpus. Two commands with the same plan do the same work."""

    version: int = VERSION
    sources: tuple[SourceConfig, ...]
    input: str
    units: int
    tokenizer_kind: str
    tokenizer: str  # its fingerprint
    vocab_size: int
    sequence_length: int
    validation_fraction: float
    decontaminate: str = ""  # which files, and how
    near_duplicates: float = 0.0
    contents: str = ""  # digest of the files' bytes; empty in a plan written before there was one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared corpus that is complete."""

    plan: Plan
    tokenizer_file: str
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    sources: tuple[SourceCount, ...]
    left_out: LeftOut

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All files of rows."""
        return self.train + self.validation

    @property
    def rows(self) -> int:
        """Rows to train on."""
        return sum(shard.rows for shard in self.train)

    @property
    def tokens(self) -> int:
        """Positions to train on, without padding."""
        return sum(shard.tokens for shard in self.train)

    @property
    def digest(self) -> str:
        """Changes when any row changes, or their order."""
        shards = "".join(f"{shard.rows}:{shard.digest};" for shard in self.shards)
        what = f"{self.plan.sequence_length};{self.plan.tokenizer};{shards}"
        return hashlib.blake2b(what.encode(), digest_size=8).hexdigest()


def read_manifest(folder: PreparedFolder) -> Manifest:
    """The manifest of a folder. Raises UserError: there is none, it is damaged, or a newer version wrote it."""
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
    for file in (manifest.tokenizer_file, *(shard.name for shard in manifest.shards)):
        folder.at(file)
    return manifest


def read_tokenizer(folder: PreparedFolder, manifest: Manifest) -> Tokenizer:
    """The tokeniser that made the rows. Raises UserError where its file is missing or another one."""
    name = folder.at(manifest.tokenizer_file)
    try:
        tokenizer = deserialize(manifest.plan.tokenizer_kind, folder.read(manifest.tokenizer_file))
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file; copy the folder again") from None
    if tokenizer.fingerprint != manifest.plan.tokenizer:
        raise UserError(f"{name} is not the tokenizer of the manifest; copy the folder again")
    return tokenizer


def as_json(value: Any) -> bytes:
    """A plan, a report or a manifest as the content of a file."""
    return (json.dumps(to_dict(value), indent=1) + "\n").encode()


def _damaged(name: AnyPath, error: Exception) -> UserError:
    return UserError(f"{name} is damaged ({error}); run the same `looplm tokenize` command again to write it anew")
