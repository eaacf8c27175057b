import pytest
from byte_level import smollm2_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from inference_models import FakeTokenizer

from looplm_jax.convert._sentencepiece_json import sentencepiece_json
from looplm_jax.data.tokenizers import JsonTokenizer, train_sentencepiece
from looplm_jax.inference._stopping import TextStream


class ByteTokenizer(FakeTokenizer):
    """One token per byte; token 256 is special and omitted from the text."""

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode(errors="replace")


UNICODE = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.fixture(scope="module")
def tokenizers():
    """Returns the tokenizers of our training and of Ouro, and the exported form of ours."""
    ours = train_sentencepiece(["the loop reads the state\n"] * 50, 290)
    return ours, smollm2_tokenizer(), JsonTokenizer(sentencepiece_json(ours.serialize()))


def stream(tokens, prompt=(), tokenizer=None):
    text_stream = TextStream(tokenizer or ByteTokenizer(), prompt)
    return [text_stream.push(token) for token in tokens] + [text_stream.close()]


@given(st.text(max_size=20), st.text(max_size=20))
def test_pieces_are_the_text(prompt, text):
    assert "".join(stream(text.encode(), prompt.encode())) == text


def test_a_character_comes_when_it_is_whole():
    assert stream("é!".encode()) == ["", "é", "!", ""]


def test_broken_bytes_come_at_the_end():
    assert stream([0x41, 0xC3]) == ["A", "", "\ufffd"]


def test_special_tokens_are_silent():
    assert stream([256, 0x41, 256]) == ["", "A", "", ""]


@given(prompt=UNICODE, text=UNICODE)
def test_real_tokenizers_split_no_character(tokenizers, prompt, text):
    for tokenizer in tokenizers:
        pieces = stream(tokenizer.encode(text), tokenizer.encode(prompt), tokenizer)
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(text=UNICODE)
def test_a_turn_of_chat_is_its_text(tokenizers, text):
    for tokenizer in tokenizers:
        start, end = (tokenizer.token_id(name) for name in ("<|im_start|>", "<|im_end|>"))
        prompt = [start, *tokenizer.encode("assistant\n")]
        assert "".join(stream([*tokenizer.encode(text), end], prompt, tokenizer)) == text


@given(text=UNICODE, data=st.data())
def test_a_character_that_the_prompt_begins_belongs_to_what_follows(tokenizers, text, data):
    """The prompt up to its last complete character, followed by the pieces, is the text."""
    content = text.encode()
    cut = data.draw(st.integers(0, len(content)))
    assert prompt_text(content[:cut]) + "".join(stream(content[cut:], content[:cut])) == text
    for tokenizer in tokenizers:
        if tokenizer.kind == "sentencepiece":
            ids = [tokenizer.token_id(f"<0x{byte:02X}>") or piece_id(tokenizer, byte) for byte in content]
            pieces = stream(ids[cut:], ids[:cut], tokenizer)
            assert prompt_text(content[:cut]) + "".join(pieces) == tokenizer.decode(ids)


def prompt_text(content):
    """Returns the text of the complete characters."""
    return content.decode(errors="ignore")


def piece_id(tokenizer, byte):
    return tokenizer._processor.piece_to_id(f"<0x{byte:02X}>")


def test_bytes_of_the_prompt_that_never_become_a_character_stay_there():
    assert stream([0x41], [0x42, 0xE6]) == ["A", ""]
    assert stream([0xE6, 0xBC, 0xA2], [0x42, 0xE6]) == ["", "", "漢", ""]
    assert stream(b"A", "\ufffd".encode()) == ["A", ""]
