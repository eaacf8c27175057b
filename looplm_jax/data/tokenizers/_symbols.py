"""A tokenizer for a fixed list of symbols, used by the synthetic tasks."""

import json
from collections.abc import Sequence
from typing import ClassVar

from looplm_jax.data.tokenizers._base import Tokenizer, only_as_special
from looplm_jax.errors import UserError, suggest


class SymbolTokenizer(Tokenizer):
    """A tokenizer with one id per symbol.

    Text is symbols separated by white space. The first symbol is both bos and eos.

    Raises:
      UserError: symbols are not distinct, or one is empty or contains white space.
    """

    kind: ClassVar[str] = "symbols"

    def __init__(self, symbols: Sequence[str]):
        self._symbols = tuple(symbols)
        self._ids = {symbol: index for index, symbol in enumerate(self._symbols)}
        # `encode` splits at white space, so a symbol that contains some could never be found.
        if len(self._ids) != len(self._symbols) or not all(s and not any(map(str.isspace, s)) for s in self._symbols):
            raise UserError("symbols of a vocabulary must be different words without spaces")

    @property
    def vocab_size(self) -> int:
        """The number of symbols."""
        return len(self._symbols)

    @property
    def bos_id(self) -> int:
        """The id of the first symbol."""
        return 0

    @property
    def eos_id(self) -> int:
        """The id of the first symbol."""
        return 0

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of symbols that are separated by white space.

        Raises:
          UserError: a symbol is unknown, or is the first symbol and `special` is false.
        """
        ids = [self._id(symbol) for symbol in text.split()]
        # The start of a document must not be forged by its text.
        if not special and self.bos_id in ids:
            raise only_as_special(self.piece(self.bos_id))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the symbols, separated by single spaces."""
        return " ".join(self.piece(token) for token in ids)

    def piece(self, token_id: int) -> str:
        """Returns the symbol."""
        return self._symbols[int(token_id)]

    def token_id(self, piece: str) -> int | None:
        """Returns the id of a symbol, or None."""
        return self._ids.get(piece)

    def serialize(self) -> bytes:
        """Returns the symbols as a JSON list."""
        return json.dumps(self._symbols).encode()

    def _id(self, symbol: str) -> int:
        """Returns the id of a symbol. Raises UserError, with a suggestion, if it is unknown."""
        if symbol not in self._ids:
            raise UserError(f"{symbol!r} is not in the vocabulary of symbols{suggest(symbol, self._ids)}")
        return self._ids[symbol]
