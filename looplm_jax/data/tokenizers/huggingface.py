"""Hugging Face `tokenizer.json` files, through the optional package `tokenizers`."""

from collections.abc import Sequence
from typing import Any, ClassVar

from looplm_jax.data.tokenizers.base import END_OF_TEXT, Tokenizer, not_unicode
from looplm_jax.data.tokenizers.sentencepiece import SPACE_MARK
from looplm_jax.errors import UserError

# A tokenizer.json does not say which tokens begin and end a document; these are the names in use, best first.
_BOS_NAMES = (END_OF_TEXT, "<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
_EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


class JsonTokenizer(Tokenizer):
    """A tokeniser given by the bytes of its `tokenizer.json`."""

    kind: ClassVar[str] = "tokenizer.json"

    def __init__(self, content: bytes):
        self._content = content
        self._tokenizer = _parse(content)
        self._tokenizer.encode_special_tokens = True
        self._bos_id = self._first_of(_BOS_NAMES)
        self._eos_id = self._first_of(_EOS_NAMES)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int:
        """Id that stands before every document."""
        return self._bos_id

    @property
    def eos_id(self) -> int:
        """Id that stands after every document."""
        return self._eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without the special tokens of the file's template. Raises UserError as SentencePiece's."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise not_unicode() from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Special tokens are left out."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """One token as shown to people; the raw piece where its bytes are no text by themselves."""
        raw = self._tokenizer.id_to_token(int(token_id)) or ""
        if SPACE_MARK in raw:
            return raw.replace(SPACE_MARK, " ")
        text = self._tokenizer.decode([int(token_id)], skip_special_tokens=False)
        return raw if "\ufffd" in text else text

    def token_id(self, piece: str) -> int | None:
        """The id of a token by name, or None."""
        return self._tokenizer.token_to_id(piece)

    def serialize(self) -> bytes:
        """The bytes of the `tokenizer.json`."""
        return self._content

    def _first_of(self, names: Sequence[str]) -> int:
        ids = (self._tokenizer.token_to_id(name) for name in names)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise UserError(f"the tokenizer.json has none of the tokens {', '.join(names)}; add one of them")
        return found


def _parse(content: bytes) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError("a tokenizer.json needs another package; pip install 'looplm_jax[hf]'") from None
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except ValueError:
        raise UserError("this is not a tokenizer.json; give the file that Hugging Face tokenizers save") from None
