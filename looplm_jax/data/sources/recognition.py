"""Recognition by content of files whose names do not show their format."""

import dataclasses
import json

from looplm_jax.data.sources.files import DataFile
from looplm_jax.errors import UserError

_TABLES = (".csv", ".tsv")
_BACKUPS = (".bak", ".crdownload", ".old", ".orig", ".part", ".swp", ".tmp", "~")
_MAGIC = {b"PAR1": ".parquet", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_HEAD_BYTES = 2**16
_BOM = b"\xef\xbb\xbf"


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
