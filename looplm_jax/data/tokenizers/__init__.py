"""Tokenizers: SentencePiece models, Hugging Face `tokenizer.json` files and folders, and fixed lists of symbols."""

from looplm_jax.data.tokenizers.base import END_OF_TEXT, IM_END, IM_START, Tokenizer, check_vocab
from looplm_jax.data.tokenizers.folder import FolderTokenizer, TokenIds
from looplm_jax.data.tokenizers.huggingface import JsonTokenizer
from looplm_jax.data.tokenizers.loading import deserialize, load_tokenizer
from looplm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer

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
]
