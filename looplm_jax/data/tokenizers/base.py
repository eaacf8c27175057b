"""What every tokeniser offers, and the names of the special tokens."""

import hashlib
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from looplm_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids in `[0, vocab_size)` and back. `kind` and `serialize()` rebuild it: see `deserialize`."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def bos_id(self) -> int:
        """Id that stands before every document."""

    @property
    def eos_id(self) -> int:
        """Id that stands after every document."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of a text.

        Names of special tokens inside the text are text, so users cannot forge a turn of a chat. With `special` they
        become these tokens.

        Raises:
          UserError: half a surrogate pair, or text that the vocabulary expresses by a special token alone.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Special tokens are left out."""

    def piece(self, token_id: int) -> str:
        """One token as shown to people: its text, or `<0xE2>` for a byte that is no text by itself."""

    def token_id(self, piece: str) -> int | None:
        """The id of a special token by name, or None where there is no such token."""

    def serialize(self) -> bytes:
        """Everything the tokeniser is, as bytes; equal tokenisers give equal bytes."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `serialize()`, in hexadecimal."""
        return hashlib.sha256(self.serialize()).hexdigest()


def not_unicode() -> UserError:
    """The mistake of encoding half a surrogate pair, as broken bytes on a command line become."""
    return UserError("the text holds half a surrogate pair, which is not Unicode; remove it")


def only_as_special(name: str) -> UserError:
    """Returns the error of a text for a part of which the vocabulary has nothing but a special token."""
    return UserError(
        f"the vocabulary expresses part of the text only as the special token {name}, which plain text never becomes; "
        "change the text, or set special_tokens to parse such names"
    )


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError where the model has fewer ids than the tokenizer; those that it has beyond are never targets."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or data.tokenizer to another file"
        )
