"""Tokenizers: SentencePiece models, Hugging Face `tokenizer.json` files and folders, and fixed lists of symbols.

Every class implements the protocol `Tokenizer`. Plain text never becomes a special token, unless `special=True` asks
for it, so a user cannot forge a turn of a chat:

    >>> from looplm_jax.data.tokenizers import SymbolTokenizer
    >>> tokenizer = SymbolTokenizer(["<end>", "one", "two"])
    >>> tokenizer.encode("two one two")
    [2, 1, 2]
    >>> tokenizer.encode("one <end>", special=True)
    [1, 0]

Loading and training:
  `load_tokenizer` reads a file or a folder, `deserialize` the bytes in a checkpoint; `train_sentencepiece` trains a
  model on texts. `check_vocab` compares a tokenizer with the vocabulary of a model.

Kinds of tokenizers:
  `SentencePieceTokenizer`, `JsonTokenizer`, `FolderTokenizer` with its `TokenIds`, `SymbolTokenizer`.

The chat format:
  `END_OF_TEXT`, `IM_START` and `IM_END` are the names of its special tokens. `with_chat_tokens` adds those that a
  tokenizer lacks.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # Loading and training.
    from looplm_jax.data.tokenizers._loading import deserialize, load_tokenizer
    from looplm_jax.data.tokenizers._sentencepiece import train_sentencepiece

    # The interface, and the special tokens of the chat format.
    from looplm_jax.data.tokenizers._base import END_OF_TEXT, IM_END, IM_START, Tokenizer, check_vocab
    from looplm_jax.data.tokenizers._chat_tokens import with_chat_tokens

    # Kinds of tokenizers.
    from looplm_jax.data.tokenizers._sentencepiece import SentencePieceTokenizer
    from looplm_jax.data.tokenizers._tokenizer_json import JsonTokenizer
    from looplm_jax.data.tokenizers._folder import FolderTokenizer, TokenIds
    from looplm_jax.data.tokenizers._symbols import SymbolTokenizer

__all__ = [
    "END_OF_TEXT",
    "IM_END",
    "IM_START",
    "FolderTokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "SymbolTokenizer",
    "TokenIds",
    "Tokenizer",
    "check_vocab",
    "deserialize",
    "load_tokenizer",
    "train_sentencepiece",
    "with_chat_tokens",
]
