"""Tokenizers in Hugging Face's `tokenizer.json` format, by means of the optional package `tokenizers`."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from looplm_jax.data.tokenizers.base import END_OF_TEXT, Tokenizer, not_unicode, only_as_special
from looplm_jax.data.tokenizers.hidden_names import template_names, unknown_token, with_names_hidden
from looplm_jax.data.tokenizers.sentencepiece import SPACE_MARK
from looplm_jax.data.tokenizers.special import is_unknown_name, special_names
from looplm_jax.errors import UserError

# A tokenizer.json does not specify which tokens begin and end a document. These are the usual names, by preference.
_BOS_NAMES = (END_OF_TEXT, "<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
_EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


class JsonTokenizer(Tokenizer):
    """A tokenizer given by the content of its `tokenizer.json`.

    Truncation and padding settings in the file are ignored.

    Args:
      content: the bytes of the file.
      bos_id: the id that precedes every document; found by name by default.
      eos_id: the id that follows every document; found by name by default.
      special_ids: ids to treat as special, in addition to those that the file marks.
    """

    kind: ClassVar[str] = "tokenizer.json"

    def __init__(
        self,
        content: bytes,
        bos_id: int | None = None,
        eos_id: int | None = None,
        special_ids: Collection[int] = (),
    ):
        self._content = content
        self._tokenizer = _parse(content)

        # The highest id counts, not the number of entries, because ids may have gaps.
        vocabulary = self._tokenizer.get_vocab()
        self._vocab_size = max(vocabulary.values(), default=-1) + 1
        self._bos_id, self._eos_id = self._ends(bos_id, eos_id)

        self._unknown = unknown_token(content)
        self._names = self._special_names(vocabulary, {self._bos_id, self._eos_id, *special_ids})
        self._special = frozenset(vocabulary[name] for name in self._names)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return self._vocab_size

    @property
    def bos_id(self) -> int:
        """The id that precedes every document, or the eos if the file has no token with a usual bos name."""
        return self._bos_id

    @property
    def eos_id(self) -> int:
        """The id that follows every document, or the bos if the file has no token with a usual eos name."""
        return self._eos_id

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of a text, without the special tokens that the file's template would add.

        With `special`, names of special tokens in the text are parsed as these tokens, and the ids are those of
        `transformers`. Without it, the ids are the same for every text that contains no such name.

        Raises:
          UserError: a lone surrogate, or text that a vocabulary without an unknown token cannot express.
        """
        ids = _ids(self._tokenizer, text)
        # Fast path: the second tokenizer is built and used only for texts that contain the name of a special token.
        named = self._special.intersection(ids)
        if special or not named:
            return ids

        try:
            ids = _ids(self._plain, text)
        except UserError:
            raise only_as_special(self._tokenizer.id_to_token(min(named))) from None

        for token in self._structure.intersection(ids):
            raise only_as_special(self._tokenizer.id_to_token(token))

        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of a sequence of ids, without special tokens."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """Returns one token for display: its text, or the raw piece if its bytes are not text on their own."""
        raw = self._tokenizer.id_to_token(int(token_id)) or ""
        if SPACE_MARK in raw:
            return raw.replace(SPACE_MARK, " ")

        # U+FFFD replaces bytes that are not valid UTF-8.
        text = self._tokenizer.decode([int(token_id)], skip_special_tokens=False)
        return raw if "\ufffd" in text else text

    def token_id(self, piece: str) -> int | None:
        """Returns the id of a token by name, or None."""
        return self._tokenizer.token_to_id(piece)

    def serialize(self) -> bytes:
        """Returns the content of the `tokenizer.json`."""
        return self._content

    def implied_ids(self) -> tuple[int, int] | None:
        """Returns bos and eos as found by the usual names, or None if the file has no such token."""
        ends = [token for token in (self._first_of(_BOS_NAMES), self._first_of(_EOS_NAMES)) if token is not None]
        return (ends[0], ends[-1]) if ends else None

    def _ends(self, bos: int | None, eos: int | None) -> tuple[int, int]:
        """Returns bos and eos: the given ids, else those found by name.

        If only one of them exists, it serves as both.
        """
        bos = self._first_of(_BOS_NAMES) if bos is None else bos
        eos = self._first_of(_EOS_NAMES) if eos is None else eos
        ends = [token for token in (bos, eos) if token is not None]
        if not ends:
            names = ", ".join(dict.fromkeys(_BOS_NAMES + _EOS_NAMES))
            raise UserError(f"the tokenizer.json has none of the tokens {names}; add one of them")
        return ends[0], ends[-1]

    def _first_of(self, names: Sequence[str]) -> int | None:
        """Returns the id of the first of these names that is in the vocabulary, or None."""
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    def _special_names(self, vocabulary: Mapping[str, int], ids: Collection[int]) -> frozenset[str]:
        """Returns the names of all special tokens, and marks added tokens as special that the file does not mark.

        Tokens with one of `ids` are special if they are added tokens. Words of the model itself are not marked: such a
        word may be used for padding and is still ordinary text, which `decode` must show.
        """
        by_id = self._tokenizer.get_added_tokens_decoder()
        added = by_id.values()

        called = {token.content for token in added if token.special} | {by_id[i].content for i in ids if i in by_id}
        names = special_names(vocabulary) | called.union(template_names(self._content)).intersection(vocabulary)

        # Only special tokens are left out by the library's `skip_special_tokens`.
        others = [token for token in added if token.content in names and not token.special]
        for token in others:
            token.special = True
        self._tokenizer.add_special_tokens(others)
        return names

    @functools.cached_property
    def _structure(self) -> frozenset[int]:
        """Special tokens that plain text never becomes: all except the unknown token, if that has no second meaning."""
        if self._unknown is None or not is_unknown_name(self._unknown):
            return self._special
        return self._special.difference([self._tokenizer.token_to_id(self._unknown)])

    @functools.cached_property
    def _plain(self) -> Any:
        """A variant of the tokenizer with the same ids, which never outputs a special token."""
        return _parse(with_names_hidden(self._content, self._names))


# Calls of the library


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Encodes a text with a tokenizer of the library, and converts the library's errors."""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:
        raise not_unicode() from None
    # A panic of the Rust code is a BaseException.
    except BaseException as error:
        raise _explain(error, "the tokenizer.json cannot encode this text") from None


def _parse(content: bytes) -> Any:
    """Returns the library's tokenizer for the content of a `tokenizer.json`, without truncation and padding."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("a tokenizer.json needs another package; pip install 'looplm_jax[hf]'") from None

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        raise _explain(error, "this is not a tokenizer.json that Hugging Face tokenizers save") from None

    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _explain(error: BaseException, what: str) -> BaseException:
    """Converts a failure of `tokenizers` to a UserError.

    A failure is an exception, or a panic of the Rust code, which is a BaseException. Others, such as KeyboardInterrupt,
    are returned unchanged.
    """
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return UserError(f"{what}: {' '.join(str(error).split())}")
    return error
