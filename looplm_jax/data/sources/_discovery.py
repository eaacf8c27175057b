"""Resolution of a path, folder or glob to files, by the same rules for training, preparation and evaluation."""

import dataclasses
import functools
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from looplm_jax.config import ReadLimits, RecordKind, SourceConfig
from looplm_jax.data.sources import _local_paths as local_paths
from looplm_jax.data.sources._files import DataFile, file_system, readable, suffix
from looplm_jax.data.sources._local_paths import Entry
from looplm_jax.errors import UserError
from looplm_jax.files import check_regular
from looplm_jax.terminal import one_line

_LINES = (".json", ".jsonl", ".ndjson")
_RECORDS = (".array_record", ".arrayrecord", *_LINES, ".parquet")
_TEXTS = (".md", ".py", ".rst", ".txt")
_KINDS_SHOWN = 8
_DESCRIPTION = ".json"  # in a folder, .json files usually describe the data, so they are read only if named explicitly

# Tables have no agreed way to quote line breaks, and backups repeat documents.
_TABLES = (".csv", ".tsv")
_BACKUPS = (".bak", ".crdownload", ".old", ".orig", ".part", ".swp", ".tmp", "~")
_MAGIC = {b"PAR1": ".parquet", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Enough to see what a file is; remote files are not read completely for that.
_HEAD_BYTES = 2**16
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Discovery:
    """The files to read, sorted by path, and the number of files left out, by kind."""

    files: tuple[DataFile, ...]
    left_out: Mapping[str, int]


def find_files(
    pattern: str, source: SourceConfig | None = None, limits: ReadLimits | None = None, *, by_content: bool = True
) -> Discovery:
    """Returns the files of a path, a folder or a glob.

    A folder means all files of known kinds below it; symbolic links are followed. A path that exists is taken
    literally, even if it contains wildcards. A file that is reached through several links counts once.

    Args:
      pattern: the path, folder, glob or URL.
      source: the field to read, and whether records are chats; texts by default.
      limits: limits on reading the returned files.
      by_content: whether to recognize a named file of unknown kind by its content; otherwise it is returned unchanged.

    Raises:
      UserError: nothing matches, the file system cannot be reached, or a named file cannot be read as data.
    """
    finder = _Finder(source or SourceConfig(path=pattern), limits or ReadLimits(), by_content)
    with readable(pattern):
        finder.find(*file_system(pattern))

    if not finder.files:
        left_out = f"; left out {describe(finder.left_out)}" if finder.left_out else ""
        raise UserError(
            f"no file matches {pattern!r}{left_out}; check the path, and quote a glob: --data 'folder/*.jsonl'"
        )

    return Discovery(tuple(sorted(finder.files, key=lambda file: file.path)), finder.left_out)


def describe(counts: Mapping[str, int]) -> str:
    """Returns the number of files, in all and for the most frequent kinds, as one line."""
    frequent = sorted(counts, key=lambda kind: (-counts[kind], kind))[:_KINDS_SHOWN]
    kinds = [f"{counts[kind]:,} {one_line(kind)}" for kind in sorted(frequent)]
    total = sum(counts.values())
    others = total - sum(counts[kind] for kind in frequent)
    return f"{total:,} ({', '.join(kinds)}{f', {others:,} of other kinds' if others else ''})"


# Search


class _Finder:
    """Collects the files of one pattern."""

    def __init__(self, source: SourceConfig, limits: ReadLimits, by_content: bool):
        self._source, self._limits, self._by_content = source, limits, by_content
        self.files: list[DataFile] = []
        self.left_out: Counter[str] = Counter()

    def find(self, fs: Any, path: str) -> None:
        """Finds the files of a path, folder or glob. Raises OSError, and UserError for files that are not data."""
        # The order of the tests matters: a name that exists is taken literally before it is tried as a pattern.
        is_local = DataFile(fs, path).is_local
        if is_local:
            check_regular(path)
        if fs.isfile(path) and not path.endswith("/"):  # first, because `isdir` downloads the whole file over HTTP
            self.files.append(self._named(fs, path))
        elif fs.isdir(path):
            self._add_folder(fs, path.rstrip("/") or "/")
        elif is_local and os.path.islink(path):
            # A link that leads nowhere is neither a file nor a folder.
            raise _broken(path)
        else:
            self._add_matches(fs, path, local_paths.glob(path) if is_local else sorted(fs.glob(path)))

    def _named(self, fs: Any, path: str) -> DataFile:
        """Returns a file that the user named. Raises UserError if it is not data."""
        file = DataFile(fs, path, self._limits)
        if file.is_local and not os.path.isfile(path):
            check_regular(path)
            raise _broken(path)

        # A file that was named is meant to be read, so its content is tried where its name says nothing.
        if self._by_content and file.suffix not in _RECORDS + _TEXTS:
            file = recognize(file)

        if self._source.kind is RecordKind.CHAT and file.suffix not in _RECORDS:
            raise UserError(f"{file.name} is text and holds no chats; leave out --chat, or give .jsonl or .parquet")
        return file

    def _add_matches(self, fs: Any, pattern: str, matches: Iterable[str]) -> None:
        """Adds the files that a glob matches, except hidden ones and outputs of this library."""
        root = local_paths.fixed_part(pattern)
        # Many matches share a folder, so each folder is listed once.
        output_kind = functools.cache(lambda folder: _output_kind(os.listdir(folder)))

        files = []

        for path in matches:
            if local_paths.hidden_in_glob(path, pattern):
                self.left_out["hidden"] += 1
            elif fs.isdir(path):
                self.left_out["folders"] += 1
            elif kind := next(_outputs_above(DataFile(fs, path), root, output_kind), None):
                self.left_out[f"in a {kind}"] += 1
            else:
                files.append((Entry(path), self._named(fs, path)))

        self._add_once(files)

    def _add_folder(self, fs: Any, root: str) -> None:
        """Adds the data files below a folder."""
        is_local = DataFile(fs, root).is_local
        entries = list(local_paths.tree(root)) if is_local else [Entry(path) for path in fs.find(root)]
        # Hidden entries go first: a hidden folder may hold a run or a model that is none of the data.
        entries = self._without_outputs(root, self._without_hidden(root, entries))
        found = [(entry, file) for entry in entries if (file := self._in_folder(fs, entry.path))]

        # If several paths lead to one file, prefer a name with a known suffix, then a path without links.
        found = sorted(
            self._without_cards(found), key=lambda pair: (bool(pair[1].content_suffix), pair[0].linked, pair[0].path)
        )
        self._add_once(found)

    def _add_once(self, found: Iterable[tuple[Entry, DataFile]]) -> None:
        """Adds files, skipping those that were already reached through another link."""
        seen = set()
        for entry, file in found:
            # Links are resolved on local disks only.
            real = os.path.realpath(entry.path) if file.is_local else entry.path
            if real in seen:
                self.left_out["linked twice"] += 1
            else:
                seen.add(real)
                self.files.append(file)

    def _without_hidden(self, root: str, entries: Iterable[Entry]) -> list[Entry]:
        """Drops hidden files and files in hidden folders. A hidden folder counts as one entry left out."""
        kept, hidden = [], set()
        for entry in entries:
            parts = _relative(root, entry.path).split("/")
            # The outermost hidden component identifies what was left out.
            first = next((number for number, part in enumerate(parts) if local_paths.is_hidden(part)), None)
            if first is None:
                kept.append(entry)
            else:
                hidden.add("/".join(parts[: first + 1]))

        # Counter drops zeros when added.
        self.left_out += Counter({"hidden": len(hidden)})
        return kept

    def _without_outputs(self, root: str, entries: list[Entry]) -> list[Entry]:
        """Drops outputs of this library: prepared corpora, run folders, and text files next to model weights.

        Raises:
          UserError: the root folder itself is a prepared corpus or a run folder.
        """
        # Folders are recognized by the names in them, which are listed already; nothing is opened.
        names = _names_by_folder([_relative(root, entry.path) for entry in entries])
        outputs = {folder: kind for folder, inside in names.items() if (kind := _output_kind(inside))}
        models = {folder for folder, inside in names.items() if _is_model(inside)}
        if "" in outputs:
            raise UserError(f"{root} is a {outputs['']}, not a folder of documents; name the files in it that are data")

        kept, used = [], set()
        for entry in entries:
            relative = _relative(root, entry.path)
            # The outermost output folder counts; folders inside it are part of it.
            output = next((folder for folder in _folders_of(relative) if folder in outputs), None)
            if output is not None:
                used.add(output)
            elif relative.rpartition("/")[0] in models and suffix(relative) in _TEXTS:
                # Model cards and licenses, not documents to learn from.
                self.left_out["beside model weights"] += 1
            else:
                kept.append(entry)
        self.left_out += Counter(outputs[folder] for folder in used)
        return kept

    def _in_folder(self, fs: Any, path: str) -> DataFile | None:
        """Returns a file of a folder if it is data. Otherwise counts it as left out and returns None."""
        file = DataFile(fs, path, self._limits)
        known = _is_known(file)

        if file.is_local and not os.path.isfile(path):
            if known:
                check_regular(path)
                raise _broken(path)
            self.left_out["broken links and special files"] += 1
            return None

        # Remote files are not opened to recognize their content.
        if not known and file.is_local and holds_records(file, self._source.key):
            return dataclasses.replace(file, content_suffix=".jsonl")
        if not known or (self._source.kind is RecordKind.CHAT and file.suffix in _TEXTS):
            self.left_out[suffix(path) or "without an ending"] += 1
            return None

        return file

    def _without_cards(self, found: list[tuple[Entry, DataFile]]) -> list[tuple[Entry, DataFile]]:
        """Drops README files in, or above, a folder of records, because they describe the data."""
        records = (file.path for _, file in found if file.suffix in _RECORDS)
        described = {folder for path in records for folder in _folders_of(path)}

        kept = []
        for entry, file in found:
            folder, _, name = file.path.rpartition("/")
            if folder in described and file.suffix in _TEXTS and name.lower().partition(".")[0] == "readme":
                self.left_out["README beside records"] += 1
            else:
                kept.append((entry, file))

        return kept


# Kinds of files and folders


def _is_known(file: DataFile) -> bool:
    """Whether the name of a file in a folder shows that it is data."""
    if file.compression is None:
        return file.suffix in _RECORDS + _TEXTS and file.suffix != _DESCRIPTION
    return file.suffix in _LINES + _TEXTS


def _output_kind(names: Iterable[str]) -> str | None:
    """Returns the kind of this library's output that a folder with these names is, or None."""
    names = frozenset(names)
    if "looplm_plan.json" in names:
        return "prepared corpus"
    if "config.json" in names and not names.isdisjoint(("metrics.jsonl", "checkpoints")):
        return "run folder"
    return None


def _is_model(names: Iterable[str]) -> bool:
    """Whether a folder with these names holds a model's configuration and weights."""
    return "config.json" in names and any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)


def _outputs_above(file: DataFile, root: str, output_kind: Callable[[str], str | None]) -> Iterator[str]:
    """Yields the kind of each output folder of this library that contains a local file, below `root`."""
    for folder in _folders_of(_relative(root, file.path)):
        if folder and file.is_local and (kind := output_kind(posixpath.join(root, folder))):
            yield kind


# Paths


def _names_by_folder(paths: Iterable[str]) -> dict[str, set[str]]:
    """Returns the names in each folder of a list of relative paths."""
    names: dict[str, set[str]] = {}
    for path in paths:
        for folder in _folders_of(path):
            names.setdefault(folder, set()).add(path.removeprefix(folder).strip("/").partition("/")[0])
    return names


def _relative(root: str, path: str) -> str:
    """Returns a path relative to the root."""
    return path.removeprefix(root).strip("/")


def _folders_of(path: str) -> Iterator[str]:
    """Yields the folders that contain a path, outermost first, beginning with the root, ""."""
    parts = path.split("/")
    for depth in range(len(parts)):
        yield "/".join(parts[:depth])


def _broken(path: str) -> UserError:
    """Returns the error for a broken symbolic link."""
    return UserError(f"{path} is a link to a file that does not exist; correct or remove it")


# Recognition of files by content, if their names do not show their format


def recognize(file: DataFile) -> DataFile:
    """Returns a file that the user named, with the suffix of its content: JSON Lines or text.

    Raises:
      UserError: it is neither.
    """
    if file.suffix in _TABLES:
        raise UserError(f"{file.name}: {file.suffix} is not read; convert it to .jsonl or .parquet")

    head = _head(file)
    if _begins_with_record(head, None):
        return dataclasses.replace(file, content_suffix=".jsonl")
    ending = next((ending for magic, ending in _MAGIC.items() if head.startswith(magic)), None)
    if ending:
        raise UserError(f"{file.name}: its content is that of a {ending} file; give it that ending")
    # Zero bytes do not occur in UTF-8 text. UTF-16 is left to `check_encoding`, which has a better message.
    if b"\0" in head and not head.startswith(_UTF_16):
        raise UserError(f"{file.name} is neither text nor of a known kind; convert it to .jsonl or .parquet")
    return file


def holds_records(file: DataFile, key: str) -> bool:
    """Whether a file in a folder is JSON Lines whose first object has the field `key`. Backup files are ignored."""
    name = file.path.lower()
    if name.endswith((*_BACKUPS, *_TABLES, ".json")):
        return False
    try:
        return _begins_with_record(_head(file), key)
    except UserError:  # not compressed as its name implies, or unreadable
        return False


def _begins_with_record(head: bytes, key: str | None) -> bool:
    """Whether the content begins with a line that is a JSON object, with the field `key` if it is given."""
    line, newline, _ = head.removeprefix(_BOM).lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    try:
        record = json.loads(line)
    except RecursionError:
        return False
    except ValueError:  # the line may be longer than the part that was read
        return not newline and (line.startswith(b'{"') if key is None else json.dumps(key).encode() in line)
    return isinstance(record, dict) and (key is None or key in record)


def _head(file: DataFile) -> bytes:
    """Returns the first bytes of a file's content."""
    with file.open() as stream:
        return stream.read(_HEAD_BYTES)
