"""What is common to the file formats: a file's documents by index, and what happens to records that are none."""

from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt64

from looplm_jax.config import OnBadRecord
from looplm_jax.errors import UserError


class BadRecord(ValueError):
    """Why a record is not a document."""


class Shard(Protocol):
    """The documents of one file."""

    @property
    def keys(self) -> UInt64[np.ndarray, "N"]:
        """`splits.document_key` of every document."""

    def read(self, index: int) -> str:
        """The text of a document, read from the file."""


class BadRecordPolicy:
    """Stops at the first bad record, or counts them."""

    def __init__(self, on_bad_record: OnBadRecord):
        self._on_bad_record = on_bad_record
        self.skipped = 0

    def handle(self, where: str, problem: object) -> None:
        """Count the record, or raise UserError that names its place."""
        if self._on_bad_record is OnBadRecord.STOP:
            raise UserError(f"{where}: {problem}; mend it, or leave such records out with --on-bad-record skip")
        self.skipped += 1


def checked_text(value: Any) -> str:
    """`value` if it is Unicode text, else BadRecord. JSON can hold half a surrogate pair, which is not."""
    if not isinstance(value, str):
        raise BadRecord(f"the text is not a string but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord("the text holds half a surrogate pair, which is not Unicode") from None
    return value


def as_keys(keys: list[int]) -> UInt64[np.ndarray, "N"]:
    """Document keys as an array."""
    return np.array(keys, dtype=np.uint64)
