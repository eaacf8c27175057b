"""Plain text: one document a file."""

import dataclasses

import numpy as np
from jaxtyping import UInt64

from looplm_jax.data.sources.files import DataFile
from looplm_jax.data.sources.records import BadRecordPolicy, as_keys
from looplm_jax.data.splits import document_key


@dataclasses.dataclass(frozen=True, eq=False)
class TextShard:
    """A file that is one document, or none where it is empty."""

    file: DataFile
    keys: UInt64[np.ndarray, "N"]

    def read(self, index: int) -> str:
        """The whole text; `index` can only be 0."""
        return self.file.read().decode()


def index_text(file: DataFile, bad: BadRecordPolicy) -> TextShard:
    """Check that the file is UTF-8, and note its key."""
    try:
        text = file.read().decode()
    except UnicodeDecodeError as error:
        bad.handle(file.name, f"not UTF-8 at byte {error.start}")
        text = ""
    return TextShard(file, as_keys([document_key(text)] if text else []))
