"""Which files a path, a folder or a glob means: the same rules for training, `looplm tokenize` and evaluation files."""

import dataclasses
import functools
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from looplm_jax.config import ReadLimits, RecordKind, SourceConfig
from looplm_jax.data.sources import local_paths
from looplm_jax.data.sources.files import DataFile, file_system, readable, suffix
from looplm_jax.data.sources.local_paths import Entry
from looplm_jax.data.sources.recognition import holds_records, recognize
from looplm_jax.errors import UserError
from looplm_jax.files import check_regular
from looplm_jax.printing import one_line

_LINES = (".json", ".jsonl", ".ndjson")
_RECORDS = (".array_record", ".arrayrecord", *_LINES, ".parquet")
_TEXTS = (".md", ".py", ".rst", ".txt")
_KINDS_SHOWN = 8
_DESCRIPTION = ".json"  # beside the data, it is more often a description than data; name it to read it


@dataclasses.dataclass(frozen=True)
class Discovery:
    """Files to read, sorted by path, and how many of which kind were left out."""

    files: tuple[DataFile, ...]
    left_out: Mapping[str, int]


def find_files(
    pattern: str, source: SourceConfig | None = None, limits: ReadLimits | None = None, *, by_content: bool = True
) -> Discovery:
    """Returns the files of a path, a folder (all files of known kinds below it, through links) or a glob.

    A path that exists is that path, whatever characters it has. A file that several links lead to counts once.

    Args:
      pattern: the path, folder, glob or URL.
      source: which field is read, and whether the records are chats; by default texts.
      limits: of reading, for the files that are returned.
      by_content: whether a named file of an unknown kind is looked into; else it is returned as it is.

    Raises:
      UserError: nothing matches, the place cannot be reached, or what is named cannot be read as data.
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
    """Returns, in one line, how many files there are, in all and of each kind; of many kinds, the most frequent."""
    frequent = sorted(counts, key=lambda kind: (-counts[kind], kind))[:_KINDS_SHOWN]
    kinds = [f"{counts[kind]:,} {one_line(kind)}" for kind in sorted(frequent)]
    total = sum(counts.values())
    others = total - sum(counts[kind] for kind in frequent)
    return f"{total:,} ({', '.join(kinds)}{f', {others:,} of other kinds' if others else ''})"


class _Finder:
    """Collects the files of one pattern."""

    def __init__(self, source: SourceConfig, limits: ReadLimits, by_content: bool):
        self._source, self._limits, self._by_content = source, limits, by_content
        self.files: list[DataFile] = []
        self.left_out: Counter[str] = Counter()

    def find(self, fs: Any, path: str) -> None:
        """Finds the files of a path, folder or glob. Raises OSError, and UserError for what is no data."""
        is_local = DataFile(fs, path).is_local
        if is_local:
            check_regular(path)
        if fs.isfile(path) and not path.endswith("/"):  # first, as HTTP fetches it whole to see if it is a folder
            self.files.append(self._named(fs, path))
        elif fs.isdir(path):
            self._add_folder(fs, path.rstrip("/") or "/")
        elif is_local and os.path.islink(path):
            raise _broken(path)
        else:
            self._add_matches(fs, path, local_paths.glob(path) if is_local else sorted(fs.glob(path)))

    def _named(self, fs: Any, path: str) -> DataFile:
        """Returns a file that the user named, if it holds data."""
        file = DataFile(fs, path, self._limits)
        if file.is_local and not os.path.isfile(path):
            check_regular(path)
            raise _broken(path)
        if self._by_content and file.suffix not in _RECORDS + _TEXTS:
            file = recognize(file)
        if self._source.kind is RecordKind.CHAT and file.suffix not in _RECORDS:
            raise UserError(f"{file.name} is text and holds no chats; leave out --chat, or give .jsonl or .parquet")
        return file

    def _add_matches(self, fs: Any, pattern: str, matches: Iterable[str]) -> None:
        root = local_paths.fixed_part(pattern)
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
        is_local = DataFile(fs, root).is_local
        entries = list(local_paths.tree(root)) if is_local else [Entry(path) for path in fs.find(root)]
        entries = self._without_outputs(root, self._without_hidden(root, entries))
        found = [(entry, file) for entry in entries if (file := self._in_folder(fs, entry.path))]

        # Of several paths to one file, one whose name says what it is, and no link.
        found = sorted(
            self._without_cards(found), key=lambda pair: (bool(pair[1].content_suffix), pair[0].linked, pair[0].path)
        )
        self._add_once(found)

    def _add_once(self, found: Iterable[tuple[Entry, DataFile]]) -> None:
        seen = set()
        for entry, file in found:
            real = os.path.realpath(entry.path) if file.is_local else entry.path
            if real in seen:
                self.left_out["linked twice"] += 1
            else:
                seen.add(real)
                self.files.append(file)

    def _without_hidden(self, root: str, entries: Iterable[Entry]) -> list[Entry]:
        kept, hidden = [], set()
        for entry in entries:
            parts = _relative(root, entry.path).split("/")
            first = next((number for number, part in enumerate(parts) if local_paths.is_hidden(part)), None)
            if first is None:
                kept.append(entry)
            else:
                hidden.add("/".join(parts[: first + 1]))
        self.left_out += Counter({"hidden": len(hidden)})
        return kept

    def _without_outputs(self, root: str, entries: list[Entry]) -> list[Entry]:
        """Leaves out what this library writes: prepared corpora, runs, and text files beside the weights of a model."""
        names = _names_by_folder([_relative(root, entry.path) for entry in entries])
        outputs = {folder: kind for folder, inside in names.items() if (kind := _output_kind(inside))}
        models = {folder for folder, inside in names.items() if _is_model(inside)}
        if "" in outputs:
            raise UserError(f"{root} is a {outputs['']}, not a folder of documents; name the files in it that are data")

        kept, used = [], set()
        for entry in entries:
            relative = _relative(root, entry.path)
            output = next((folder for folder in _folders_of(relative) if folder in outputs), None)
            if output is not None:
                used.add(output)
            elif relative.rpartition("/")[0] in models and suffix(relative) in _TEXTS:
                self.left_out["beside model weights"] += 1
            else:
                kept.append(entry)
        self.left_out += Counter(outputs[folder] for folder in used)
        return kept

    def _in_folder(self, fs: Any, path: str) -> DataFile | None:
        """Returns a file of a folder if it is data; counts it otherwise."""
        file = DataFile(fs, path, self._limits)
        known = _is_known(file)
        if file.is_local and not os.path.isfile(path):
            if known:
                check_regular(path)
                raise _broken(path)
            self.left_out["broken links and special files"] += 1
            return None
        if not known and file.is_local and holds_records(file, self._source.key):
            return dataclasses.replace(file, content_suffix=".jsonl")
        if not known or (self._source.kind is RecordKind.CHAT and file.suffix in _TEXTS):
            self.left_out[suffix(path) or "without an ending"] += 1
            return None
        return file

    def _without_cards(self, found: list[tuple[Entry, DataFile]]) -> list[tuple[Entry, DataFile]]:
        """Leaves out a README at or above files of records, which it describes."""
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


def _is_known(file: DataFile) -> bool:
    """Whether the name of a file of a folder says that it is data."""
    if file.compression is None:
        return file.suffix in _RECORDS + _TEXTS and file.suffix != _DESCRIPTION
    return file.suffix in _LINES + _TEXTS


def _output_kind(names: Iterable[str]) -> str | None:
    """Returns what a folder with these files is, if a command of this library wrote it."""
    names = frozenset(names)
    if "looplm_plan.json" in names:
        return "prepared corpus"
    if "config.json" in names and not names.isdisjoint(("metrics.jsonl", "checkpoints")):
        return "run folder"
    return None


def _is_model(names: Iterable[str]) -> bool:
    return "config.json" in names and any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)


def _outputs_above(file: DataFile, root: str, output_kind: Callable[[str], str | None]) -> Iterator[str]:
    """Yields the kinds of the folders of this library that a file is in, below `root`; of local ones."""
    for folder in _folders_of(_relative(root, file.path)):
        if folder and file.is_local and (kind := output_kind(posixpath.join(root, folder))):
            yield kind


def _names_by_folder(paths: Iterable[str]) -> dict[str, set[str]]:
    """Returns the names in each folder of relative paths."""
    names: dict[str, set[str]] = {}
    for path in paths:
        for folder in _folders_of(path):
            names.setdefault(folder, set()).add(path.removeprefix(folder).strip("/").partition("/")[0])
    return names


def _relative(root: str, path: str) -> str:
    return path.removeprefix(root).strip("/")


def _folders_of(path: str) -> Iterator[str]:
    """Yields the folders that a path is in, the outermost first."""
    parts = path.split("/")
    for depth in range(len(parts)):
        yield "/".join(parts[:depth])


def _broken(path: str) -> UserError:
    return UserError(f"{path} is a link to a file that does not exist; correct or remove it")
