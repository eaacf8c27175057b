"""Datasets of Hugging Face's `datasets` library, which is imported on first use."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from looplm_jax.config import SourceConfig
from looplm_jax.data._documents import Document
from looplm_jax.data.sources._files import DataFile, file_system
from looplm_jax.data.sources._formats import BadRecord, BadRecordPolicy, FoundDocument, Span, ranges, value_document
from looplm_jax.errors import UserError, suggest

PREFIX = "huggingface:"
_OPTIONS = ("name", "revision", "split", "data_dir", "data_files")
# Opening a dataset reads its metadata, so recently used ones stay open.
_OPEN_DATASETS = 64
_BLOCK = 256  # rows in memory at a time


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a dataset on the Hugging Face Hub, or a folder written by `save_to_disk`.

    Attributes:
      path: `huggingface:name,option=value,...`, or the folder or URL.
    """

    path: str
    suffix = PREFIX
    compression = None

    @property
    def name(self) -> str:
        """The dataset as used in messages."""
        return self.path

    @property
    def size(self) -> int:
        """The size of the dataset's rows in memory, in bytes."""
        # The Arrow tables are memory-mapped, so this does not read them.
        return _load(self.path).data.nbytes

    def digest(self) -> str:
        """Returns a digest of the files of a saved dataset.

        Empty for a dataset on the Hub, which its revision identifies.
        """
        if self.path.startswith(PREFIX):
            return ""

        fs, folder = file_system(self.path)
        return "".join(DataFile(fs, path).digest() for path in sorted(fs.find(folder)))


class HuggingFace:
    """The format of Hugging Face datasets. A place is the index of a row."""

    def spans(self, file: Dataset, unit_bytes: int) -> tuple[Span, ...]:
        """Returns ranges of rows, each with as many rows as fill a unit on average."""
        rows = len(_load(file.path))
        return ranges(rows, rows * unit_bytes // max(file.size, 1))

    def scan(self, file: Dataset, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[FoundDocument]:
        """Yields the documents of a range of rows, with one block of rows in memory at a time."""
        column = _column(file, source)

        for block in range(span.start, min(span.end, len(column)), _BLOCK):
            stop = min(block + _BLOCK, span.end, len(column))
            for row, value in zip(range(block, stop), _values(column, source.key, block, stop), strict=True):
                try:
                    if isinstance(value, BadRecord):
                        raise value
                    document = value_document(value, source)
                except BadRecord as problem:
                    bad.handle(lambda row=row: f"{file.name}: row {row}", problem)  # type: ignore[misc]
                    continue
                if document:
                    yield FoundDocument((row, 0), document)

    def read(self, file: Dataset, source: SourceConfig, place: tuple[int, int]) -> Document:
        """Returns the document of one row."""
        return value_document(_column(file, source)[place[0]][source.key], source)


def _values(column: Any, key: str, start: int, stop: int) -> list[Any]:
    """Returns the values of a range of rows, with a BadRecord in place of each that is not UTF-8."""
    try:
        return column[start:stop][key]
    except UnicodeDecodeError as error:
        if stop - start == 1:
            return [BadRecord(f"not UTF-8 at byte {error.start} of the text")]

        # The error does not identify the row, so each is read separately.
        return [value for row in range(start, stop) for value in _values(column, key, row, row + 1)]


# Loading


def is_saved_dataset(fs: Any, folder: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any(fs.exists(f"{folder.rstrip('/')}/{name}") for name in ("dataset_dict.json", "state.json"))


@functools.lru_cache(maxsize=_OPEN_DATASETS)
def _column(file: Dataset, source: SourceConfig) -> Any:
    """Returns the dataset reduced to the column that the source reads. Raises UserError if there is no such column."""
    dataset = _load(file.path)
    if source.key not in dataset.column_names:
        wanted = f"{source.key_setting}={source.key!r}"
        raise UserError(f"{file.name}: there is no column {wanted}{suggest(source.key, dataset.column_names)}")
    # The other columns, such as images, would be decoded with every row.
    return dataset.select_columns([source.key])


@functools.lru_cache(maxsize=_OPEN_DATASETS)
def _load(path: str) -> Any:
    """Loads one split of a dataset. Raises UserError with the library's reason if that fails."""
    datasets = _library(path)
    try:
        if not path.startswith(PREFIX):
            return _one_split(datasets.load_from_disk(path), path)
        name, options = _parse(path)
        return _one_split(datasets.load_dataset(name, **options), path)
    except UserError:
        raise
    except Exception as error:  # the library documents no exceptions and raises those of its dependencies
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"{path}: {reason}; check the name, the options and the connection") from None


def _parse(path: str) -> tuple[str, dict[str, str]]:
    """Returns the name and the options of a path. Raises UserError for a malformed one."""
    name, *options = path.removeprefix(PREFIX).split(",")
    pairs = [option.partition("=") for option in options]
    for key, equals, _ in pairs:
        if not equals or key.strip() not in _OPTIONS:
            raise UserError(f"{path}: {key!r} is not an option=value of a dataset{suggest(key, _OPTIONS)}")
    if not name:
        raise UserError(f"{path}: there is no name; write {PREFIX}dataset,split=train")
    return name, {key.strip(): value.strip() for key, _, value in pairs}


def _one_split(loaded: Any, path: str) -> Any:
    """Returns the dataset. Raises UserError if it has several splits."""
    if not isinstance(loaded, dict):
        return loaded
    # Choosing a split silently would train on the test split of some datasets.
    splits = ", ".join(sorted(map(str, loaded)))
    how = f"add ,split= and one of: {splits}" if path.startswith(PREFIX) else f"name the folder of one of: {splits}"
    raise UserError(f"{path}: the dataset has several splits; {how}")


def _library(path: str) -> Any:
    """Returns the `datasets` module. Raises UserError if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: the library `datasets` is not installed; pip install 'looplm_jax[datasets]'"
        ) from None
    return datasets
