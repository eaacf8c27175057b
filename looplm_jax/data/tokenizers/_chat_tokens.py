"""Adds the tokens of the chat format to a tokenizer that lacks them."""

import json
from collections.abc import Mapping, Sequence

from looplm_jax.data.tokenizers._base import IM_END, IM_START, Tokenizer
from looplm_jax.data.tokenizers._folder import FolderTokenizer
from looplm_jax.data.tokenizers._sentencepiece import SentencePieceTokenizer, with_control_pieces
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.data.tokenizers._tokenizer_json import JsonTokenizer
from looplm_jax.errors import UserError

_TEMPLATE = "chat_template"


def with_chat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer with `<|im_start|>` and `<|im_end|>`, or itself if it has both.

    New tokens get the ids after the last one. The ids of all others, and of every text, stay as they are. The chat
    template of a Hugging Face folder without these tokens is for another format, so it is left out.

    Raises:
      UserError: the tokenizer cannot be extended.
    """
    missing = [name for name in (IM_START, IM_END) if tokenizer.token_id(name) is None]
    if not missing:
        return tokenizer

    extended = _extended(tokenizer, missing)
    wanted = list(range(tokenizer.vocab_size, tokenizer.vocab_size + len(missing)))
    if [extended.token_id(name) for name in missing] != wanted:
        raise UserError(
            f"{' and '.join(missing)} cannot be added to this tokenizer, whose ids have gaps; "
            "add them with the program that made it"
        )
    return extended


def _extended(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """Returns a tokenizer of the same kind with these special tokens."""
    match tokenizer:
        case FolderTokenizer():
            content = _with_added_tokens(tokenizer.tokenizer_json, names, tokenizer.vocab_size)
            return FolderTokenizer.of(content, tokenizer.ids, _without_templates(tokenizer.files))
        case JsonTokenizer():
            return JsonTokenizer(_with_added_tokens(tokenizer.serialize(), names, tokenizer.vocab_size))
        case SentencePieceTokenizer():
            return SentencePieceTokenizer(with_control_pieces(tokenizer.serialize(), names))
        case SymbolTokenizer():
            return SymbolTokenizer([*json.loads(tokenizer.serialize()), *names])
    raise UserError(f"a tokenizer of the kind {tokenizer.kind!r} cannot be extended by {' and '.join(names)}")


def _with_added_tokens(content: bytes, names: Sequence[str], first: int) -> bytes:
    """Returns a `tokenizer.json` with special tokens that have the ids from `first` on."""
    file = json.loads(content)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": token, "content": name, **plain} for token, name in enumerate(names, start=first)]
    file["added_tokens"] = [*(file.get("added_tokens") or ()), *added]
    return json.dumps(file, ensure_ascii=False).encode()


def _without_templates(files: Mapping[str, str]) -> dict[str, str]:
    """Returns the files of a folder without its chat templates."""
    kept = {name: text for name, text in files.items() if _TEMPLATE not in name}
    settings = json.loads(kept.get("tokenizer_config.json", "{}"))
    if settings.pop(_TEMPLATE, None) is not None:
        kept["tokenizer_config.json"] = json.dumps(settings)
    return kept
