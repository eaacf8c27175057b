"""The policy for records that are not valid documents."""

from collections.abc import Callable

from looplm_jax.config import OnBadRecord
from looplm_jax.errors import UserError


class BadRecord(ValueError):
    """Raised with the reason why a record is not a valid document."""


class BadRecordPolicy:
    """Stops at the first bad record, or skips and counts them."""

    def __init__(self, on_bad_record: OnBadRecord):
        self._on_bad_record = on_bad_record
        self.skipped = 0
        self.first = ""  # location and reason of the first one

    def handle(self, where: Callable[[], str], problem: object) -> None:
        """Counts a bad record, or raises a UserError with its location.

        `where` is a function because it can be slow to find the location.
        """
        if self._on_bad_record is OnBadRecord.STOP:
            raise UserError(f"{where()}: {problem}; mend it, or leave such records out with --on-bad-record skip")
        self.skipped += 1
        self.first = self.first or f"{where()}: {problem}"
