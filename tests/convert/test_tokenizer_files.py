import json
import logging

import pytest
from byte_level import smollm2_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece_cases import merged, model_bytes

from looplm_jax.convert._tokenizer_files import stop_ids, tokenizer_files
from looplm_jax.data import Message, tokens_and_mask
from looplm_jax.data._examples import render
from looplm_jax.data.tokenizers import JsonTokenizer, SentencePieceTokenizer, SymbolTokenizer, train_sentencepiece
from looplm_jax.errors import UserError

TEXT = "the loop  reads\n\tstate 2026 of\u2581it 's . é 🙂 <|im_start|>x<|unk|>"
SYMBOLS = ("<bos>", "<len_1>", "+", "1", "<ans>")
UNICODE = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def bpe() -> SentencePieceTokenizer:
    return train_sentencepiece(["the loop reads the state of it\n"] * 50, 300)


@pytest.fixture(scope="module")
def byte_level() -> JsonTokenizer:
    return smollm2_tokenizer()


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Returns the tokenizer that `transformers` loads from our files."""
    transformers = pytest.importorskip("transformers")

    def loaded(tokenizer):
        folder = tmp_path_factory.mktemp("folder")
        for name, content in tokenizer_files(tokenizer, max_positions=512).items():
            (folder / name).write_bytes(content)
        return transformers.AutoTokenizer.from_pretrained(folder)

    return loaded


@pytest.fixture(scope="module")
def pairs(bpe, byte_level, load):
    return [(tokenizer, load(tokenizer)) for tokenizer in (bpe, byte_level)]


def test_files(bpe, byte_level):
    for tokenizer in (bpe, byte_level):
        files = tokenizer_files(tokenizer, max_positions=512)
        assert list(files) == [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        ]
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
        assert json.loads(files["special_tokens_map.json"]) == special
        config = json.loads(files["tokenizer_config.json"])
        assert special.items() <= config.items()
        assert config["model_max_length"] == 512
    assert "chat_template.jinja" not in tokenizer_files(SymbolTokenizer(SYMBOLS), max_positions=512)


def test_a_tokenizer_json_stays_as_it_is(byte_level):
    content = b"\n" + byte_level.serialize()
    assert tokenizer_files(JsonTokenizer(content), max_positions=1)["tokenizer.json"] == content


def test_the_same_files_every_time(bpe):
    assert tokenizer_files(bpe, max_positions=1) == tokenizer_files(bpe, max_positions=1)


def test_out_and_in_again(bpe):
    pytest.importorskip("tokenizers")
    for tokenizer, text, special in ((bpe, TEXT, False), (SymbolTokenizer(SYMBOLS), "<bos> + 1 1", True)):
        again = JsonTokenizer(tokenizer_files(tokenizer, max_positions=512)["tokenizer.json"])
        ids = tokenizer.encode(text, special=special)
        assert again.encode(text, special=special) == ids
        assert again.decode(ids) == text
        assert (again.vocab_size, again.bos_id, again.eos_id) == (tokenizer.vocab_size, 0, 0)


def test_stop_ids(bpe, byte_level):
    assert stop_ids(bpe) == stop_ids(byte_level) == [0, 2]
    assert stop_ids(SymbolTokenizer(SYMBOLS)) == [0]


def test_a_model_that_cannot_be_expressed():
    tokenizer = SentencePieceTokenizer(model_bytes(merged(["ab", "\u2581"]), trainer={3: 1, 35: 1}))
    with pytest.raises(UserError, match="model_type unigram"):
        tokenizer_files(tokenizer, max_positions=1)


@given(text=UNICODE)
@example(text=TEXT)
def test_transformers_gives_the_same_ids(pairs, text):
    for ours, theirs in pairs:
        ids = ours.encode(text)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_transformers_knows_the_special_tokens(pairs):
    for ours, theirs in pairs:
        assert len(theirs) == ours.vocab_size
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 0)
        assert theirs("<|im_start|>a<|im_end|>")["input_ids"] == [1, *ours.encode("a"), 2]
        assert theirs.decode([0, 1, *ours.encode("a"), 2], skip_special_tokens=True) == "a"
        assert theirs.model_max_length == 512


def test_a_batch_is_what_the_model_takes(pairs):
    """Without token types, which `generate` refuses."""
    for ours, theirs in pairs:
        batch = theirs(["the loop", "it"], padding=True, padding_side="left")
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["input_ids"][1] == [0] * batch["attention_mask"][1].count(0) + ours.encode("it")


def test_transformers_loads_in_silence(bpe, load, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load(bpe)
    assert caplog.text == ""


def test_what_transformers_saves_can_be_read(pairs, tmp_path):
    for ours, theirs in pairs:
        theirs.save_pretrained(tmp_path)
        assert JsonTokenizer((tmp_path / "tokenizer.json").read_bytes()).encode(TEXT) == ours.encode(TEXT)


def test_chat_is_ours(pairs):
    chat = [Message("system", "Be brief."), Message("user", "loop?\n"), Message("assistant", "the state 12 é")]
    turns = [{"role": message.role, "content": message.content} for message in chat]
    for ours, theirs in pairs:
        text = theirs.apply_chat_template(turns, tokenize=False)
        assert text == render(chat)
        assert theirs(text)["input_ids"] == tokens_and_mask(chat, ours).tokens.tolist()
        prompt = theirs.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
        assert prompt == render(chat[:2]) + "<|im_start|>assistant\n"


@given(content=UNICODE | st.text(" \n\ta"))
def test_chat_of_any_text_is_ours(pairs, content):
    chat = [Message("user", content), Message("assistant", content)]
    for ours, theirs in pairs:
        assert theirs(render(chat))["input_ids"] == tokens_and_mask(chat, ours).tokens.tolist()


def test_symbols_are_words(load):
    ours = SymbolTokenizer(SYMBOLS)
    theirs = load(ours)
    spaces = "".join(character for character in map(chr, range(0x110000)) if character.isspace())
    for text in ("<bos> <len_1> + 1 1", "", spaces, "+".join(f" {space} " for space in spaces)):
        assert theirs(text)["input_ids"] == ours.encode(text, special=True)
    assert theirs.decode([0, 2, 3]) == ours.decode([0, 2, 3]) == "<bos> + 1"
    with pytest.raises(Exception, match="Missing"):
        theirs("<bos> 7")
