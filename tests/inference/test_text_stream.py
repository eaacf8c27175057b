from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.inference.text_stream import TextStream


class ByteTokenizer:
    """One token a byte; token 256 is special and left out of text."""

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode(errors="replace")


def stream(tokens, prompt=()):
    text_stream = TextStream(ByteTokenizer(), prompt)
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
