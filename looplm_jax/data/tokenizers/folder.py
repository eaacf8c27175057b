"""The tokenizer of a Hugging Face folder: its `tokenizer.json`, and what the other files say about tokens."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import ClassVar

from looplm_jax.data.tokenizers.expansion import check_expansion
from looplm_jax.data.tokenizers.huggingface import JsonTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The ids that the files of a folder name."""

    bos: int
    eos: int
    pad: int | None
    stop: tuple[int, ...]  # tokens that end a generation


class FolderTokenizer(JsonTokenizer):
    """A `tokenizer.json` whose special ids are named by the files beside it.

    It carries these files along (chat template, generation defaults, licenses), so they are in every checkpoint that
    descends from the folder, and in every folder that is exported from one.
    """

    kind: ClassVar[str] = "hugging face folder"

    def __init__(self, content: bytes):
        values = json.loads(content)
        check_expansion(values["tokenizer.json"].encode())
        self.ids = TokenIds(**{**values["ids"], "stop": tuple(values["ids"]["stop"])})
        special = {*self.ids.stop} if self.ids.pad is None else {*self.ids.stop, self.ids.pad}
        super().__init__(values["tokenizer.json"].encode(), self.ids.bos, self.ids.eos, special)
        self.files: Mapping[str, str] = values["files"]

    @classmethod
    def of(cls, tokenizer_json: bytes, ids: TokenIds, files: Mapping[str, str]) -> "FolderTokenizer":
        """Returns the tokenizer with these ids, and the texts of other files by name."""
        values = {"tokenizer.json": tokenizer_json.decode(), "ids": dataclasses.asdict(ids), "files": dict(files)}
        return cls(json.dumps(values, sort_keys=True).encode())

    @property
    def tokenizer_json(self) -> bytes:
        """The bytes of the `tokenizer.json`."""
        return self._content

    def serialize(self) -> bytes:
        """Returns the `tokenizer.json`, the ids and the other files, as JSON."""
        values = {
            "tokenizer.json": self._content.decode(),
            "ids": dataclasses.asdict(self.ids),
            "files": dict(self.files),
        }
        return json.dumps(values, sort_keys=True).encode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what makes tokens of text: that of the `tokenizer.json` alone where it implies the same ids."""
        implied = self.implied_ids() == (self.bos_id, self.eos_id)
        ids = b"" if implied else f"{self.bos_id} {self.eos_id}".encode()
        return hashlib.sha256(self._content + ids).hexdigest()
