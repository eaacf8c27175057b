"""The tokenizer of a Hugging Face folder: its `tokenizer.json` and the token ids that its other files name."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import ClassVar

from looplm_jax.data.tokenizers.expansion import check_expansion
from looplm_jax.data.tokenizers.huggingface import JsonTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The ids of special tokens that the files of a folder name."""

    bos: int
    eos: int
    pad: int | None
    stop: tuple[int, ...]  # ids that end generation


class FolderTokenizer(JsonTokenizer):
    """A `tokenizer.json` together with the other files of its folder, which name the special ids.

    The tokenizer carries the chat template, the generation defaults and the licenses along, so they are part of every
    checkpoint that descends from the folder and of every folder exported from such a checkpoint.
    """

    kind: ClassVar[str] = "hugging face folder"

    def __init__(self, content: bytes):
        values = json.loads(content)
        check_expansion(values["tokenizer.json"].encode())
        self.ids = TokenIds(**{**values["ids"], "stop": tuple(values["ids"]["stop"])})
        # Stop tokens and the padding token structure text, so they are special even if the file does not mark them.
        special = {*self.ids.stop} if self.ids.pad is None else {*self.ids.stop, self.ids.pad}
        super().__init__(values["tokenizer.json"].encode(), self.ids.bos, self.ids.eos, special)
        self.files: Mapping[str, str] = values["files"]

    @classmethod
    def of(cls, tokenizer_json: bytes, ids: TokenIds, files: Mapping[str, str]) -> "FolderTokenizer":
        """Returns the tokenizer of a `tokenizer.json` with the given ids and the texts of the other files, by name."""
        values = {"tokenizer.json": tokenizer_json.decode(), "ids": dataclasses.asdict(ids), "files": dict(files)}
        return cls(json.dumps(values, sort_keys=True).encode())

    @property
    def tokenizer_json(self) -> bytes:
        """The content of the `tokenizer.json`."""
        return self._content

    def serialize(self) -> bytes:
        """Returns the `tokenizer.json`, the ids and the other files as JSON."""
        values = {
            "tokenizer.json": self._content.decode(),
            "ids": dataclasses.asdict(self.ids),
            "files": dict(self.files),
        }
        return json.dumps(values, sort_keys=True).encode()

    @property
    def fingerprint(self) -> str:
        """The SHA-256 digest of everything that affects tokenization, in hexadecimal.

        It is the digest of the `tokenizer.json` alone if that implies the same bos and eos. The files that are only
        carried along do not count.
        """
        implied = self.implied_ids() == (self.bos_id, self.eos_id)
        ids = b"" if implied else f"{self.bos_id} {self.eos_id}".encode()
        return hashlib.sha256(self._content + ids).hexdigest()
