"""Tokenisers from files, and from the bytes inside a checkpoint."""

import json

from looplm_jax.data.sources.files import read_file
from looplm_jax.data.tokenizers.base import Tokenizer
from looplm_jax.data.tokenizers.expansion import check_expansion
from looplm_jax.data.tokenizers.folder import FolderTokenizer
from looplm_jax.data.tokenizers.huggingface import JsonTokenizer
from looplm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer
from looplm_jax.errors import UserError, suggest


def load_tokenizer(path: str) -> Tokenizer:
    """The tokeniser in a `.model` or `.json` file, local or at any fsspec URL.

    Raises UserError, naming the file: missing, unreadable, of another format, or of a package that is not installed.
    """
    kinds = {".model": SentencePieceTokenizer.kind, ".json": JsonTokenizer.kind}
    suffix = next((suffix for suffix in kinds if str(path).endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{path}: a tokenizer is a SentencePiece .model or a tokenizer.json; set data.tokenizer to one")
    try:
        return deserialize(kinds[suffix], read_file(str(path)))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def deserialize(kind: str, content: bytes) -> Tokenizer:
    """The tokeniser whose `kind` and `serialize()` these are. Raises UserError for an unknown kind or bad content."""
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(content)
    if kind == JsonTokenizer.kind:
        check_expansion(content)
        return JsonTokenizer(content)
    if kind == FolderTokenizer.kind:
        return FolderTokenizer(content)
    if kind == SymbolTokenizer.kind:
        return SymbolTokenizer(json.loads(content))
    known = (SentencePieceTokenizer.kind, JsonTokenizer.kind, FolderTokenizer.kind, SymbolTokenizer.kind)
    raise UserError(f"no such kind of tokenizer {kind!r}{suggest(kind, known)}")
