"""The interface of all tokenizers, and the names of special tokens."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from looplm_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

# `<|name|>`, the form of ChatML, GPT, Llama and others, and the same with the full-width bars of DeepSeek.
_MARKED = re.compile(r"<[|｜][^<>\s]+[|｜]>")

# Names of other forms, such as those of SentencePiece, BERT, Gemma and Mistral.
_NAMES = frozenset(
    (
        *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<sep>", "<cls>"),
        *("[BOS]", "[EOS]", "[PAD]", "[UNK]", "[MASK]", "[SEP]", "[CLS]"),
        *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    )
)


@runtime_checkable
class Tokenizer(Protocol):
    """A two-way mapping between text and ids in `[0, vocab_size)`.

    `kind` and `serialize()` together are enough to rebuild the tokenizer with `deserialize`.
    """

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """The number of ids."""

    @property
    def bos_id(self) -> int:
        """The id of the token that precedes every document."""

    @property
    def eos_id(self) -> int:
        """The id of the token that follows every document."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of a text.

        By default, names of special tokens in the text are encoded as plain text, so that a user cannot forge a turn of
        a chat. With `special` they become these tokens.

        Raises:
          UserError: the text has a lone surrogate, or a part that the vocabulary can express only as a special token.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of a sequence of ids, without special tokens."""

    def piece(self, token_id: int) -> str:
        """Returns one token for display: its text, or for example `<0xE2>` for a byte that is not text on its own."""

    def token_id(self, piece: str) -> int | None:
        """Returns the id of a special token by name, or None if there is no such token."""

    def serialize(self) -> bytes:
        """Returns the whole tokenizer as bytes. Equal tokenizers give equal bytes."""

    @property
    def fingerprint(self) -> str:
        """The SHA-256 digest of `serialize()`, in hexadecimal."""
        # The content determines it, so a copy of a tokenizer in another folder counts as the same.
        return hashlib.sha256(self.serialize()).hexdigest()


def not_unicode() -> UserError:
    """Returns the error for text with a lone surrogate, as invalid bytes on a command line are decoded to."""
    return UserError("the text holds half a surrogate pair, which is not Unicode; remove it")


def only_as_special(name: str) -> UserError:
    """Returns the error for text of which the vocabulary can express a part only as a special token."""
    return UserError(
        f"the vocabulary expresses part of the text only as the special token {name}, which plain text never becomes; "
        "change the text, or set special_tokens to parse such names"
    )


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError if the tokenizer has more ids than the model.

    A model may have more ids than its tokenizer; the additional ids are never targets.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or data.tokenizer to another file"
        )


# Special tokens, which structure a text and are not text themselves


def is_special_name(piece: str) -> bool:
    """Whether a token with this name is special, even if its vocabulary does not mark it."""
    return piece in _NAMES or _MARKED.fullmatch(piece) is not None


def is_unknown_name(piece: str) -> bool:
    """Whether a token with this name represents unknown text and nothing else."""
    return "unk" in piece.lower() or not is_special_name(piece)


def special_names(pieces: Iterable[str]) -> frozenset[str]:
    """Returns the pieces that are names of special tokens."""
    return frozenset(filter(is_special_name, pieces))
