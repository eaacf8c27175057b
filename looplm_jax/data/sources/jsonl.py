"""JSON lines: one document a line, found again by its byte offsets."""

import dataclasses
import json
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from looplm_jax.data.sources.files import DataFile
from looplm_jax.data.sources.records import BadRecord, BadRecordPolicy, as_keys, checked_text
from looplm_jax.data.splits import document_key
from looplm_jax.errors import suggest


@dataclasses.dataclass(frozen=True, eq=False)
class JsonlShard:
    """The documents of a .jsonl file: line i is the bytes `starts[i]..ends[i]`."""

    file: DataFile
    text_key: str
    starts: Int64[np.ndarray, "N"]
    ends: Int64[np.ndarray, "N"]
    keys: UInt64[np.ndarray, "N"]

    def read(self, index: int) -> str:
        """The text of one line; nothing else of the file is read."""
        line = self.file.read(int(self.starts[index]), int(self.ends[index]))
        return _text(line, self.text_key)


def index_jsonl(file: DataFile, text_key: str, bad: BadRecordPolicy) -> JsonlShard:
    """Read the file once, check every line, and note where the documents are. Blank lines and empty texts are none."""
    spans, keys, end = [], [], 0
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            start, end = end, end + len(line)
            try:
                text = _text(line, text_key) if line.strip() else ""
            except BadRecord as problem:
                bad.handle(f"{file.name}:{number}", problem)
                continue
            if text:
                spans.append((start, end))
                keys.append(document_key(text))
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    return JsonlShard(file, text_key, starts, ends, as_keys(keys))


def _text(line: bytes, text_key: str) -> str:
    record = _parse(line)
    if not isinstance(record, dict):
        raise BadRecord(f"not a JSON object but {type(record).__name__}")
    if text_key not in record:
        raise BadRecord(f"the record has no field {text_key!r}{suggest(text_key, record)}")
    return checked_text(record[text_key])


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError):
        raise BadRecord("not JSON that can be read (nested too deep, or a number too long)") from None
