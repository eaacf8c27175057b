"""SentencePiece models: BPE with byte fallback that loses nothing of the text."""

from collections.abc import Sequence
from typing import ClassVar

import sentencepiece

from looplm_jax.data.tokenizers.base import Tokenizer, not_unicode
from looplm_jax.errors import UserError

# SentencePiece writes spaces as this character and reads it back as a space, so the character itself must go as bytes.
SPACE_MARK = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model given by its bytes (the content of a `.model` file)."""

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes):
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError("this is not a SentencePiece model; give a .model file or a tokenizer.json") from None
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if self.eos_id < 0:
            raise UserError("the SentencePiece model has neither a bos nor an eos token; train it with one of them")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._processor.get_piece_size()

    @property
    def bos_id(self) -> int:
        """The model's bos, or its eos where it has no bos."""
        bos = self._processor.bos_id()
        return bos if bos >= 0 else self._processor.eos_id()

    @property
    def eos_id(self) -> int:
        """The model's eos, or its bos where it has no eos (ours: one `<|endoftext|>` for both)."""
        eos = self._processor.eos_id()
        return eos if eos >= 0 else self._processor.bos_id()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Raises UserError for a lone surrogate, which is no Unicode text."""
        try:
            first, *rest = (self._processor.encode(part) for part in text.split(SPACE_MARK))
        except RuntimeError:
            raise not_unicode() from None
        return first + [token for part in rest for token in self._mark_ids + part]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; broken UTF-8 becomes the replacement character."""
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token_id: int) -> str:
        """One token as shown to people."""
        return self._processor.id_to_piece(int(token_id)).replace(SPACE_MARK, " ")

    def token_id(self, piece: str) -> int | None:
        """The id of a control token by name, or None."""
        token = self._processor.piece_to_id(piece)
        return token if self._processor.is_control(token) else None

    def serialize(self) -> bytes:
        """The bytes of the `.model` file."""
        return self._model
