"""The tokenizer files of an exported Hugging Face folder."""

import json
from collections.abc import Sequence
from typing import Any

from looplm_jax.convert._sentencepiece_json import sentencepiece_json
from looplm_jax.data.tokenizers import (
    IM_END,
    IM_START,
    FolderTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from looplm_jax.data.tokenizers._folder import kept_json, other_files

# The chat format of `data/chat.py`. The generation blocks mark its targets, for `return_assistant_tokens_mask`.
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

# The name of the token for unknown words. No symbol contains a space, so no token has this name, and `tokenizers`
# refuses unknown words.
_NO_SYMBOL = "no symbol"


def tokenizer_files(tokenizer: Tokenizer, *, max_positions: int) -> dict[str, bytes]:
    """Returns the name and content of each tokenizer file that `transformers` 4.57 and 5 load, with a ChatML template.

    A `tokenizer.json` is copied byte for byte; the other kinds of tokenizer are converted to one that gives the same
    ids. Batches are padded with the end-of-text token, the only suitable token that every tokenizer has.

    Raises UserError for a SentencePiece model that cannot be converted to a `tokenizer.json` with the same ids.
    """
    others: dict[str, bytes] = {}
    end = tokenizer.piece(tokenizer.eos_id)
    special = {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": end, "pad_token": end}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "model_input_names": ["input_ids", "attention_mask"],
        # With True, transformers would remove spaces before punctuation when decoding.
        "clean_up_tokenization_spaces": False,
        **special,
    }

    has_template = False
    if isinstance(tokenizer, FolderTokenizer):
        theirs = kept_json(tokenizer, "tokenizer_config.json")
        if theirs.pop("auto_map", None):  # it names code, which is not copied
            theirs.pop("tokenizer_class", None)
        # The folder's own settings win over our defaults.
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
    # Files of the folder replace ours of the same name.
    return {**files, **others}


# Properties of a tokenizer


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that end a text, in ascending order.

    They are the stop tokens that the model's folder names, the end of a document, and the end of a chat turn if the
    tokenizer has one. Ouro's are 0 and 2, although its published configuration names only 0 (specification, section 1).
    """
    # A model may be trained to end a text with any of these.
    named = tokenizer.ids.stop if isinstance(tokenizer, FolderTokenizer) else ()

    ends = (*named, tokenizer.eos_id, tokenizer.token_id(IM_END))
    return sorted({token for token in ends if token is not None})


def has_other_chat_template(tokenizer: Tokenizer) -> bool:
    """Returns whether the model's folder has a chat template, but none that uses the tokens of ChatML."""
    if not isinstance(tokenizer, FolderTokenizer):
        return False

    files = [tokenizer.files[name] for name in ("chat_template.jinja", "chat_template.json") if name in tokenizer.files]
    in_settings = kept_json(tokenizer, "tokenizer_config.json").get("chat_template")  # a string, or a list of templates

    templates = [*files, *([] if in_settings is None else [str(in_settings)])]
    return bool(templates) and not any(IM_START in template for template in templates)


def code_left_out(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns a warning if the model's folder names code for its tokenizer, which is not exported."""
    if isinstance(tokenizer, FolderTokenizer) and kept_json(tokenizer, "tokenizer_config.json").get("auto_map"):
        return ("auto_map of tokenizer_config.json is left out: the code that it names is not copied",)
    return ()


def _knows_chat(tokenizer: Tokenizer) -> bool:
    return None not in (tokenizer.token_id(IM_START), tokenizer.token_id(IM_END))


# The tokenizer.json


def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Returns the `tokenizer.json` of a tokenizer."""
    if isinstance(tokenizer, FolderTokenizer):
        return tokenizer.tokenizer_json

    content = tokenizer.serialize()
    if tokenizer.kind == JsonTokenizer.kind:
        return content
    if tokenizer.kind == SentencePieceTokenizer.kind:
        return sentencepiece_json(content)
    return _json(_symbols(json.loads(content)))


def _symbols(symbols: Sequence[str]) -> dict[str, Any]:
    """Returns a tokenizer of words between white space as `str.split` defines it.

    That is the white space of regular expressions, and four ASCII separators.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            # str.split also splits at the separators 0x1c to 0x1f, which \s does not match.
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
