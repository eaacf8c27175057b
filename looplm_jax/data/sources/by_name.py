"""What a path means, and the format of a file, by its name."""

from typing import Any

from looplm_jax.data.sources import huggingface
from looplm_jax.data.sources.array_record import ArrayRecord
from looplm_jax.data.sources.files import DataFile, file_system, find_files, readable
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


def find_inputs(path: str) -> tuple[Input, ...]:
    """The files of a path, glob, folder or URL; or a dataset. Raises UserError where there is none."""
    if path.startswith(huggingface.PREFIX):
        return (huggingface.Dataset(path),)
    with readable(path):
        fs, inner = file_system(path)
        saved = not fs.isfile(inner) and fs.isdir(inner) and huggingface.is_saved_dataset(fs, inner)
    return (huggingface.Dataset(path),) if saved else tuple(map(_checked, find_files(path)))


def format_of(file: Any) -> Format:
    """The format that the name of a file means; text where it means none."""
    return _FORMATS.get(file.suffix, Text())


def _checked(file: DataFile) -> DataFile:
    if file.compression and not isinstance(format_of(file), JsonLines | Text):
        raise UserError(f"{file.name}: such files are compressed inside; decompress it, and leave off the last ending")
    if not (file.compression or file.in_parts):
        raise UserError(f"{file.name}: the server does not give parts of files; download it, and name the copy")
    return file
