"""Loading of tokenizers from files and folders, and from the bytes in a checkpoint."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from looplm_jax.data.sources._files import read_file
from looplm_jax.data.tokenizers._base import Tokenizer
from looplm_jax.data.tokenizers._folder import FolderTokenizer, read_folder_tokenizer
from looplm_jax.data.tokenizers._sentencepiece import SentencePieceTokenizer
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.data.tokenizers._tokenizer_json import JsonTokenizer, check_expansion
from looplm_jax.errors import UserError, suggest


def load_tokenizer(path: str, *, warn: Callable[[str], object] = lambda _: None) -> Tokenizer:
    """Loads a tokenizer from a `.model` or `.json` file, local or at any fsspec URL, or from a Hugging Face folder.

    Args:
      path: the file or the folder. In a folder, other files name the ids that begin and end a document.
      warn: called with one line for each id that no file of a folder names or that its files contradict.

    Raises:
      UserError: the path is missing or unreadable, has another format, or needs a package that is not installed.
    """
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return _of_folder(folder, warn)

    kinds = {".model": SentencePieceTokenizer.kind, ".json": JsonTokenizer.kind}
    suffix = next((suffix for suffix in kinds if str(path).endswith(suffix)), None)
    if suffix is None:
        raise UserError(
            f"{path}: a tokenizer is a SentencePiece .model, a tokenizer.json or a Hugging Face folder; "
            "set data.tokenizer to one"
        )

    try:
        # Errors of content do not name the file, errors of reading do.
        return deserialize(kinds[suffix], read_file(str(path)))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def _of_folder(folder: Path, warn: Callable[[str], object]) -> Tokenizer:
    """Returns the tokenizer of a local folder and passes on its notes. Raises UserError without a `tokenizer.json`."""
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; give a folder that has one, or a SentencePiece .model")
    tokenizer, notes = read_folder_tokenizer(folder)
    for note in notes:
        warn(note)
    return tokenizer


def deserialize(kind: str, content: bytes) -> Tokenizer:
    """Returns the tokenizer with this `kind` and these bytes from `serialize()`.

    Raises:
      UserError: the kind is unknown, or the content is invalid.
    """
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(content)
    if kind == JsonTokenizer.kind:
        # The file may be from anywhere, so its growth is bounded before it is used.
        check_expansion(content)
        return JsonTokenizer(content)
    # `FolderTokenizer` checks the expansion itself.
    if kind == FolderTokenizer.kind:
        return FolderTokenizer(content)
    if kind == SymbolTokenizer.kind:
        return SymbolTokenizer(json.loads(content))
    known = (SentencePieceTokenizer.kind, JsonTokenizer.kind, FolderTokenizer.kind, SymbolTokenizer.kind)
    raise UserError(f"no such kind of tokenizer {kind!r}{suggest(kind, known)}")
