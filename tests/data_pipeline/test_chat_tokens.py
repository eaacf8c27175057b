"""The tokens of the chat format, added to tokenizers that lack them."""

import json

import pytest
from byte_level import TEXTS, smollm2_tokenizer

from looplm_jax.data import Message, tokens_and_mask, train_sentencepiece
from looplm_jax.data.tokenizers import (
    IM_END,
    IM_START,
    FolderTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    SymbolTokenizer,
    TokenIds,
    deserialize,
    with_chat_tokens,
)
from looplm_jax.data.tokenizers._sentencepiece import model_message
from looplm_jax.errors import UserError

CHAT = (IM_START, IM_END)


def sentencepiece():
    model = model_message().FromString(train_sentencepiece(list(TEXTS) * 20, 300).serialize())
    kept = [piece for piece in model.pieces if piece.piece.decode() not in CHAT]
    del model.pieces[:]
    model.pieces.extend(kept)
    return SentencePieceTokenizer(model.SerializeToString())


def without_chat(content):
    """Returns a `tokenizer.json` without the tokens of the chat, and the ids that follow them moved down."""
    file = json.loads(content)
    names = [name for name in file["model"]["vocab"] if name not in CHAT]
    file["model"]["vocab"] = {name: token for token, name in enumerate(names)}
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in CHAT]
    return json.dumps(file).encode()


def json_file():
    return JsonTokenizer(without_chat(smollm2_tokenizer().serialize()))


def folder():
    ids = TokenIds(bos=0, eos=0, pad=None, stop=(0,))
    settings = json.dumps({"chat_template": "[INST]{{ messages }}", "model_max_length": 8})
    files = {"tokenizer_config.json": settings, "chat_template.jinja": "[INST]", "LICENSE": "free"}
    return FolderTokenizer.of(json_file().serialize(), ids, files)


@pytest.mark.parametrize("make", [sentencepiece, json_file, folder])
def test_two_tokens_are_added_after_all_others_and_nothing_else_changes(make):
    before = make()
    assert [before.token_id(name) for name in CHAT] == [None, None]
    after = with_chat_tokens(before)
    assert type(after) is type(before)
    size = before.vocab_size
    assert [after.token_id(name) for name in CHAT] == [size, size + 1]
    assert after.vocab_size == size + 2
    assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)
    for text in (*TEXTS, "<|im_start|>user\nme<|im_end|>"):
        assert after.encode(text) == before.encode(text)
    assert after.encode("a<|im_end|>", special=True)[-1] == size + 1
    assert after.decode([size, *after.encode("the loop"), size + 1]) == "the loop"
    again = deserialize(after.kind, after.serialize())
    assert [again.token_id(name) for name in CHAT] == [size, size + 1]
    assert with_chat_tokens(after) is after
    chat = tokens_and_mask([Message("user", "the"), Message("assistant", "loop")], after)
    assert chat.tokens.tolist().count(size) == 2


def test_a_template_for_another_format_is_left_out():
    files = with_chat_tokens(folder()).files
    assert set(files) == {"tokenizer_config.json", "LICENSE"}
    assert json.loads(files["tokenizer_config.json"]) == {"model_max_length": 8}


def test_a_list_of_symbols_gets_two_more():
    tokenizer = with_chat_tokens(SymbolTokenizer(["end", IM_END, "user"]))
    assert (tokenizer.token_id(IM_START), tokenizer.token_id(IM_END)) == (3, 1)


def test_a_vocabulary_with_gaps_is_refused_in_one_line():
    file = json.loads(json_file().serialize())
    last = max(file["model"]["vocab"], key=file["model"]["vocab"].get)
    file["model"]["vocab"][last] += 5
    file["model"]["merges"] = []
    with pytest.raises(
        UserError, match=r"cannot be added to this tokenizer, whose ids have gaps; add them with the pro"
    ):
        with_chat_tokens(JsonTokenizer(json.dumps(file).encode()))
