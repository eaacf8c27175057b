"""The tokeniser files of a Hugging Face folder."""

import json
from collections.abc import Sequence
from typing import Any

from looplm_jax.convert.sentencepiece_json import sentencepiece_json
from looplm_jax.data.tokenizers import (
    IM_END,
    IM_START,
    FolderTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from looplm_jax.data.tokenizers.folder_files import kept_json, other_files

# The chat of `data/chat.py`. The blocks of generation mark its targets, for `return_assistant_tokens_mask`.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# The name of the token for unknown words. No symbol holds a space, so there is no such token and the words are refused.
_NO_SYMBOL = "no symbol"


def tokenizer_files(tokenizer: Tokenizer, *, max_positions: int) -> dict[str, bytes]:
    """Name and content of each tokeniser file that `transformers` 4.57 and 5 load, ChatML template included.

    A `tokenizer.json` stays as it is, byte for byte; the other kinds of tokeniser become one that gives the same ids.
    Batches are padded with the end of text, which is the only such token that every tokeniser has.

    Raises UserError for a SentencePiece model that has no `tokenizer.json` with the same ids.
    """
    others: dict[str, bytes] = {}
    end = tokenizer.piece(tokenizer.eos_id)
    special = {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": end, "pad_token": end}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    has_template = False
    if isinstance(tokenizer, FolderTokenizer):
        theirs = kept_json(tokenizer, "tokenizer_config.json")
        if theirs.pop("auto_map", None):  # names code, which is not copied
            theirs.pop("tokenizer_class", None)
        settings = {**settings, **theirs}
        special = {**special, **kept_json(tokenizer, "special_tokens_map.json")}
        others = other_files(tokenizer)
        has_template = "chat_template" in theirs or any(name.startswith("chat_template.") for name in others)
    files = {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special),
    }
    if _knows_chat(tokenizer) and not has_template:
        files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    return {**files, **others}


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that end a text, ascending: those that the folder of the model names, the end of a document,
    and the end of a turn of chat where the tokenizer has it.

    Ouro's are 0 and 2, though its published configuration names 0 alone (specification, section 1).
    """
    named = tokenizer.ids.stop if isinstance(tokenizer, FolderTokenizer) else ()
    ends = (*named, tokenizer.eos_id, tokenizer.token_id(IM_END))
    return sorted({token for token in ends if token is not None})


def has_other_chat_template(tokenizer: Tokenizer) -> bool:
    """Returns whether the folder of the model brought a chat template, and none that names the tokens of ChatML."""
    if not isinstance(tokenizer, FolderTokenizer):
        return False
    files = [tokenizer.files[name] for name in ("chat_template.jinja", "chat_template.json") if name in tokenizer.files]
    in_settings = kept_json(tokenizer, "tokenizer_config.json").get("chat_template")  # a text, or a list of named ones
    templates = [*files, *([] if in_settings is None else [str(in_settings)])]
    return bool(templates) and not any(IM_START in template for template in templates)


def code_left_out(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns a warning where the folder of the model named code for its tokenizer, which is not exported."""
    if isinstance(tokenizer, FolderTokenizer) and kept_json(tokenizer, "tokenizer_config.json").get("auto_map"):
        return ("auto_map of tokenizer_config.json is left out: the code that it names is not copied",)
    return ()


def _knows_chat(tokenizer: Tokenizer) -> bool:
    return None not in (tokenizer.token_id(IM_START), tokenizer.token_id(IM_END))


def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    if isinstance(tokenizer, FolderTokenizer):
        return tokenizer.tokenizer_json
    content = tokenizer.serialize()
    if tokenizer.kind == JsonTokenizer.kind:
        return content
    if tokenizer.kind == SentencePieceTokenizer.kind:
        return sentencepiece_json(content)
    return _json(_symbols(json.loads(content)))


def _symbols(symbols: Sequence[str]) -> dict[str, Any]:
    """Words between white space, as `str.split` knows it: that of regular expressions, and four separators of ASCII."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\x1c-\x1f]+"},
            "behavior": "Removed",
            "invert": False,
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {symbol: token for token, symbol in enumerate(symbols)},
            "unk_token": _NO_SYMBOL,
        },
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
