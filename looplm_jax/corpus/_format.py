"""The format of a prepared corpus: its folder, local or in a bucket, and its manifest.

Every file is written atomically. The manifest lists the shards, the plan that produced them, and the records that were
left out.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import SourceConfig
from looplm_jax.data.tokenizers import Tokenizer, deserialize
from looplm_jax.errors import UserError
from looplm_jax.files import (
    AnyPath,
    absolute,
    any_path,
    forget_listing,
    locked,
    make_folder,
    report_failed_reads,
    report_failed_writes,
    write_atomically,
)

# Names in the folder.
MANIFEST = "manifest.json"
PLAN = "looplm_plan.json"
SHARD = ".arrayrecord"
SIGNATURES = "signatures"
_BUCKET = "gs://"
UNFINISHED = ".unfinished"

VERSION = 1  # of the format


class PreparedFolder:
    """Files by name. A name may contain one subfolder.

    Args:
      url: a local path or a gs:// URL, the kinds that ArrayRecord reads.

    Raises:
      UserError: the URL is of another kind.
    """

    def __init__(self, url: str):
        if not _is_possible(url):
            raise UserError(f"{url}: a prepared corpus is in a local folder or at gs://; choose one of them")
        self.path: AnyPath = absolute(any_path(url))

    def at(self, name: str) -> AnyPath:
        """Returns the path of a file, as used by messages and by ArrayRecord.

        Raises:
          UserError: the name leads out of the folder or is not printable.
        """
        # Names come from manifests, which may be from anywhere.
        parts = name.split("/")
        if len(parts) > 2 or any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts):
            raise UserError(f"{self.path} names the file {name!r}, which is not in that folder; copy the folder again")
        return self.path / name

    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
          FileNotFoundError: there is no such file.
          UserError: the file cannot be read.
        """
        # Raised outside of `report_failed_reads`, which converts every OSError to a UserError.
        path, missing = self.at(name), None
        with report_failed_reads(path):
            try:
                return path.read_bytes()
            except FileNotFoundError as error:
                missing = error
        raise missing

    def names(self, folder: str = "") -> frozenset[str]:
        """Returns the names in the folder, or in a subfolder. The result is empty if there is no such folder."""
        path = self.path / folder if folder else self.path
        with report_failed_reads(path):
            # Clients of buckets cache listings, and other processes write to the folder as well.
            forget_listing(path)
            try:
                return frozenset(found.name for found in path.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return frozenset()

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file atomically. Raises UserError if the file system refuses."""
        with report_failed_writes(self.at(name)):
            # Buckets have no folders; there this does nothing.
            make_folder(self.at(name).parent)
        write_atomically(self.at(name), content)

    def publish(self, file: Path, name: str) -> None:
        """Moves a finished file from the scratch folder to its final name.

        Raises UserError if the file system refuses.
        """
        place = self.at(name)

        if isinstance(place, Path):
            with report_failed_writes(place):
                os.replace(file, place)
        else:
            # An upload to a bucket is atomic. Shards are small enough to be read into memory.
            write_atomically(place, file.read_bytes())
            file.unlink()

    def remove_folder(self, name: str) -> None:
        """Removes a subfolder if it exists."""
        with report_failed_writes(self.at(name)), contextlib.suppress(FileNotFoundError):
            if isinstance(self.path, Path):
                shutil.rmtree(self.path / name)
            else:
                self.path.joinpath(name).rmtree()

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[Path]:
        """Creates the folder and yields a scratch folder for unfinished files, which is removed at the end.

        A local folder is locked against other processes, and unfinished files of a killed process are removed. In a
        bucket there are no locks, and the scratch folder is local.

        Raises:
          UserError: the folder is a file, another process is writing to it, or the file system refuses.
        """
        if not isinstance(self.path, Path):
            with tempfile.TemporaryDirectory() as scratch:
                yield Path(scratch)
            return

        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --out")

        with report_failed_writes(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

        # The scratch folder is inside the corpus folder, so that `publish` renames within one file system.
        scratch_here = self.path / UNFINISHED
        # The operating system releases the lock if the process is killed.
        with locked(self.path, busy=self._busy):
            shutil.rmtree(scratch_here, ignore_errors=True)
            with report_failed_writes(self.path):
                scratch_here.mkdir()

            try:
                yield scratch_here
            finally:
                shutil.rmtree(scratch_here, ignore_errors=True)

    def _busy(self) -> None:
        """Raises UserError because another process holds the lock."""
        message = f"{self.path} is being written by another process; wait for it, or choose another --out"
        raise UserError(message) from None


# Prepared corpora as sources


def is_prepared(path: str) -> bool:
    """Whether the path of a source is a prepared corpus. Raises UserError if its preparation is not finished."""
    if not _is_possible(path):
        return False
    folder = any_path(path)
    with report_failed_reads(folder):
        if (folder / MANIFEST).exists():
            return True
        if (folder / PLAN).exists():
            raise UserError(f"{path} is not finished; run the same `looplm tokenize` command again")
    return False


def _is_possible(url: str) -> bool:
    """Whether a URL is local or in Cloud Storage."""
    return url.startswith(_BUCKET) or "://" not in url


# Manifest


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
class CorpusSpec:
    """Everything that determines the bytes of a prepared corpus. Two commands with equal specs write the same files."""

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

    plan: CorpusSpec  # the name in the format
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
        # The same bytes mean something else with another tokenizer.
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
        raise UserError(f"{folder.path} holds no prepared corpus; `looplm tokenize` prepares one") from None
    except ValueError as error:
        raise _damaged(name, error) from None

    # The version comes before all fields, because those of another version may differ.
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
    # Another tokenizer would read other text in the same sequences.
    if tokenizer.fingerprint != manifest.plan.tokenizer:
        raise UserError(f"{name} is not the tokenizer of the manifest; copy the folder again")
    return tokenizer


def as_json(value: Any) -> bytes:
    """Returns a plan, a report or a manifest as the content of a JSON file."""
    return (json.dumps(to_dict(value), indent=1) + "\n").encode()


def _damaged(name: AnyPath, error: Exception) -> UserError:
    """Returns the error for an unreadable manifest."""
    return UserError(f"{name} is damaged ({error}); run the same `looplm tokenize` command again to write it again")
