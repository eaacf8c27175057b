"""Records that are no documents."""

from collections.abc import Callable

from looplm_jax.config import OnBadRecord
from looplm_jax.errors import UserError


class BadRecord(ValueError):
    """Why a record is not a document."""


class BadRecordPolicy:
    """Stops at the first bad record, or counts them."""

    def __init__(self, on_bad_record: OnBadRecord):
        self._on_bad_record = on_bad_record
        self.skipped = 0
        self.first = ""  # where and what the first one was

    def handle(self, where: Callable[[], str], problem: object) -> None:
        """Count the record, or raise UserError that names its place, which may take time to find."""
        if self._on_bad_record is OnBadRecord.STOP:
            raise UserError(f"{where()}: {problem}; mend it, or leave such records out with --on-bad-record skip")
        self.skipped += 1
        self.first = self.first or f"{where()}: {problem}"
