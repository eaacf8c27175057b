"""Tokenizers in Hugging Face's `tokenizer.json` format, by means of the optional package `tokenizers`."""

import functools
import json
import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from looplm_jax.data.tokenizers._base import (
    END_OF_TEXT,
    Tokenizer,
    is_unknown_name,
    not_unicode,
    only_as_special,
    special_names,
)
from looplm_jax.data.tokenizers._sentencepiece import SPACE_MARK
from looplm_jax.errors import UserError

# A tokenizer.json does not specify which tokens begin and end a document. These are the usual names, by preference.
_BOS_NAMES = (END_OF_TEXT, "<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
_EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")

_MOST_EXPANSION = 1024  # the longest allowed output, as a multiple of the input length


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
        # An id in a gap of the vocabulary has no token.
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

    # The file may ask for both, and would then silently drop or add tokens.
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


# Variants in which special tokens have random names, so that no text is encoded as one


def template_names(content: bytes) -> set[str]:
    """Returns the special tokens that the file's post-processor adds around a text."""
    return set(_names_of(json.loads(content).get("post_processor") or {}))


def unknown_token(content: bytes) -> str | None:
    """Returns the name of the token for text that the vocabulary cannot express, or None."""
    model = json.loads(content)["model"]
    if (place := model.get("unk_id")) is not None:
        return model["vocab"][place][0]
    return model.get("unk_token")


def with_names_hidden(content: bytes, names: Collection[str]) -> bytes:
    """Returns the tokenizer with the same ids, but with random names for the given special tokens.

    The library's option `encode_special_tokens` is not sufficient: it only disables the search for added tokens.
    WordLevel, WordPiece, Unigram, and BPE with `ignore_merges` would still find the names among the words of the
    vocabulary.
    """
    file = json.loads(content)
    # Random names cannot occur in a text by accident.
    hidden = {name: uuid.uuid4().hex for name in names}
    for token in file.get("added_tokens", ()):
        token["content"] = hidden.get(token["content"], token["content"])

    model = file["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]

    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]

    # Merges that involve a hidden piece must go, because the library rejects merges of unknown pieces.
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if hidden.keys().isdisjoint(_touched(merge, prefix))]

    return json.dumps(file).encode()


def _touched(merge: str | list[str], prefix: str) -> tuple[str, str, str]:
    """Returns the two pieces that a merge joins and the piece that it creates."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)


def _names_of(processor: dict[str, Any]) -> Iterator[str]:
    """Yields the names of special tokens in a post-processor and in those nested in it."""
    yield from processor.get("special_tokens") or ()
    yield from (processor[place][0] for place in ("cls", "sep") if place in processor)
    for inner in processor.get("processors") or ():
        yield from _names_of(inner)


# A limit on how much longer than its text the output can be


def check_expansion(content: bytes) -> None:
    """Rejects a `tokenizer.json` whose replacement rules can multiply the length of a text without a reasonable bound.

    Content that is not a JSON object is accepted here; the `tokenizers` library reports it.

    Raises:
      UserError: the replacements of encoding, or those of decoding, can make a text more than 1,024 times as long.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(values, dict):
        return

    # The factors of replacements that run one after another multiply. Encoding and decoding are separate chains.
    for steps in (("normalizer", "pre_tokenizer"), ("decoder",)):
        factor = 1.0
        for step in steps:
            for pattern, replacement in _replacements(values.get(step)):
                factor *= max(_growth(pattern, replacement), 1.0)

        if factor > _MOST_EXPANSION:
            raise UserError(
                f"the replacements in the {' and '.join(steps)} of the tokenizer.json can make a text more than "
                f"{_MOST_EXPANSION:,} times as long; use another tokenizer"
            )


def _replacements(value: Any) -> Iterator[tuple[Any, str]]:
    """Yields the pattern and the replacement of every `Replace` step, at any depth of nesting."""
    # Not recursive: a file may be nested deeper than Python's stack.
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += [inner for inner in value.values() if isinstance(inner, dict | list)]
            if value.get("type") == "Replace" and isinstance(value.get("content"), str):
                yield value.get("pattern"), value["content"]


def _growth(pattern: Any, replacement: str) -> float:
    """Returns an upper bound on the growth of a text by one replacement rule."""
    if isinstance(pattern, dict) and isinstance(found := pattern.get("String"), str):
        # An empty pattern matches between all characters: each character gains one replacement.
        return len(replacement) / len(found) if found else len(replacement) + 1

    # A regular expression matches at least one character per replacement, unless it can match the empty string.
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return len(replacement) + (not isinstance(regex, str) or _can_match_nothing(regex))


def _can_match_nothing(regex: str) -> bool:
    """Whether a regular expression may match the empty string. True if Python cannot decide it."""
    try:
        return "(?" in regex or re.fullmatch(regex, "") is not None
    except re.error:
        return True
