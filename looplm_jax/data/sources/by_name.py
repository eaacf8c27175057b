"""Resolution of a source's path to files or a dataset, and of a file's name to its format."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from looplm_jax.config import ReadLimits, SourceConfig
from looplm_jax.data.sources import huggingface
from looplm_jax.data.sources.array_record import ArrayRecord
from looplm_jax.data.sources.discovery import describe, find_files
from looplm_jax.data.sources.files import DataFile, file_system, readable
from looplm_jax.data.sources.formats import Format
from looplm_jax.data.sources.jsonl import JsonLines
from looplm_jax.data.sources.parquet import Parquet
from looplm_jax.data.sources.text import Text
from looplm_jax.errors import UserError

Input = DataFile | huggingface.Dataset
"""Documents that are read together."""

_FORMATS: dict[str, Format] = {
    ".array_record": ArrayRecord(),
    ".arrayrecord": ArrayRecord(),
    ".json": JsonLines(),
    ".jsonl": JsonLines(),
    ".ndjson": JsonLines(),
    ".parquet": Parquet(),
    huggingface.PREFIX: huggingface.HuggingFace(),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files or the dataset that a path resolves to, and the number of files left out, by kind."""

    found: tuple[Input, ...]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Input]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def find_inputs(path: str, source: SourceConfig | None = None, limits: ReadLimits | None = None) -> Inputs:
    """Returns the files of a path, glob, folder or URL, or a dataset.

    Args:
      path: a path, glob, folder, URL or dataset name.
      source: the field to read, and whether records are chats; texts by default.
      limits: limits on reading.

    Raises:
      UserError: nothing is found, or a file cannot be read as data (see `find_files`).
    """
    if path.startswith(huggingface.PREFIX):
        return Inputs((huggingface.Dataset(path),))

    with readable(path):
        fs, inner = file_system(path)
        # A saved dataset is a folder of Arrow files, which must not be searched for data files.
        saved = not fs.isfile(inner) and fs.isdir(inner) and huggingface.is_saved_dataset(fs, inner)
    if saved:
        return Inputs((huggingface.Dataset(path),))

    found = find_files(path, source, limits)
    return Inputs(tuple(map(_checked, found.files)), found.left_out)


def summarize(inputs: Iterable[Inputs]) -> str:
    """Returns one line with the numbers of files to read and of files left out, by kind."""
    read, left_out = Counter[str](), Counter[str]()
    for one in inputs:
        read.update(map(_kind, one))
        left_out.update(one.left_out)

    noun = "file" if sum(read.values()) == 1 else "files"
    count, _, kinds = describe(read).partition(" ")
    return f"reading {count} {noun} {kinds}" + (f"; left out {describe(left_out)}" if left_out else "")


def _kind(file: Input) -> str:
    """Returns the kind of a file, for display."""
    if isinstance(file, huggingface.Dataset):
        return "dataset"
    compression = file.compression.value if file.compression else ""
    if file.content_suffix:
        return f"{file.content_suffix}{compression} by content"
    return f"{file.suffix}{compression}" or "text without an ending"


def format_of(file: Any) -> Format:
    """Returns the format that a file's name implies. The default is text."""
    return _FORMATS.get(file.suffix, Text())


def _checked(file: DataFile) -> DataFile:
    """Returns the file. Raises UserError if its format cannot be read from compressed data or from its server."""
    if file.compression and not isinstance(format_of(file), JsonLines | Text):
        raise UserError(f"{file.name}: such files are compressed inside; decompress it, and leave off the last ending")
    # Compressed files are read from beginning to end; all others need random access.
    if not (file.compression or file.in_parts):
        raise UserError(f"{file.name}: the server does not give parts of files; download it, and name the copy")
    return file
