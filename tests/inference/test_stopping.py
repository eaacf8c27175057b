import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from inference_models import FakeTokenizer

from looplm_jax.errors import UserError
from looplm_jax.inference._stopping import Finish, StopConditions, StopMatcher

ALPHABET = "ab é漢🙂"  # 1 to 4 bytes; few characters, so that stop strings match and nearly match
texts = st.text(ALPHABET, max_size=30)
stops = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


class ChunkTokenizer(FakeTokenizer):
    """Token n is the n-th chunk of bytes; higher ids are special and omitted from the text."""

    def __init__(self, chunks):
        self.chunks = chunks

    def decode(self, ids):
        return b"".join(self.chunks[token] for token in ids if token < len(self.chunks)).decode(errors="replace")


@st.composite
def tokenised_texts(draw):
    """Draws a text, and its bytes split anywhere, also inside characters."""
    text = draw(texts)
    content = text.encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(content)), max_size=len(content))) | {0, len(content)})
    return text, [content[start:end] for start, end in itertools.pairwise(cuts)]


def plain_search(text, stops):
    """Returns the start of the first complete stop string, or None."""
    for end in range(len(text) + 1):
        ending_here = [stop for stop in stops if text[:end].endswith(stop)]
        if ending_here:
            return end - max(map(len, ending_here))
    return None


def matcher(chunks, stops=(), stop_ids=(), max_new_tokens=1000, prompt_ids=()):
    conditions = StopConditions(stop_ids=frozenset(stop_ids), stop_strings=tuple(stops), max_new_tokens=max_new_tokens)
    return StopMatcher(conditions, ChunkTokenizer(chunks), prompt_ids)


def feed(stop_matcher, count):
    return [stop_matcher.push(token) for token in range(count)]


@given(tokenised_texts(), stops)
@example(("aab", [b"a", b"a", b"b"]), ["ab"])
@example(("abba", [b"ab", b"ba"]), ["abbb", "b"])
@example(("ba", [b"ba"]), ["a", "ba"])
@example(("é漢", [b"\xc3", b"\xa9\xe6", b"\xbc\xa2"]), ["é漢"])
def test_the_text_ends_where_a_plain_search_finds_a_stop_string(tokenised, stops):
    text, chunks = tokenised
    stop_matcher = matcher(chunks, stops)
    given_out = "".join([*feed(stop_matcher, len(chunks)), stop_matcher.close(Finish.LENGTH)])
    end = plain_search(text, stops)
    assert given_out == text[:end]
    assert stop_matcher.finish is (Finish.LENGTH if end is None else Finish.STOP)
    assert stop_matcher.characters == len(given_out)


@given(texts, stops)
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    chunks = [character.encode() for character in text]
    stop_matcher, given_out = matcher(chunks, stops), ""
    for token in range(len(chunks)):
        given_out += stop_matcher.push(token)
        known = text[: token + 1]
        end = plain_search(known, stops)
        if end is not None:
            assert (given_out, stop_matcher.finish) == (known[:end], Finish.STOP)
            return
        beginnings = {stop[:size] for stop in stops for size in range(len(stop))}
        held = max((size for size in range(len(known) + 1) if known[len(known) - size :] in beginnings), default=0)
        assert given_out == known[: len(known) - held]
        assert stop_matcher.finish is None


@given(tokenised_texts(), st.data())
def test_a_stop_token_ends_the_text_before_its_own(tokenised, data):
    _, chunks = tokenised
    stop = data.draw(st.integers(0, len(chunks)))
    stop_matcher = matcher(chunks, ["bbbb"], stop_ids=[stop])
    pieces = feed(stop_matcher, len(chunks) + 1)
    before = b"".join(chunks[:stop]).decode(errors="replace")
    assert "".join(pieces) == before[: plain_search(before, ["bbbb"])]
    assert stop_matcher.finish is Finish.STOP


@given(tokenised_texts(), st.integers(1, 40))
def test_all_of_the_text_is_there_at_max_new_tokens(tokenised, count):
    _, chunks = tokenised
    stop_matcher = matcher(chunks, ["🙂🙂🙂🙂🙂"], max_new_tokens=count)
    assert "".join(feed(stop_matcher, len(chunks))) == b"".join(chunks[:count]).decode(errors="replace")
    assert stop_matcher.finish is (Finish.LENGTH if count <= len(chunks) else None)


def test_the_last_token_may_complete_a_stop_string():
    stop_matcher = matcher([b"a", b"b"], ["ab"], max_new_tokens=2)
    assert feed(stop_matcher, 2) == ["", ""]
    assert (stop_matcher.finish, stop_matcher.characters) == (Finish.STOP, 0)


def test_a_stop_string_is_found_in_a_text_that_ends_inside_a_character():
    stop_matcher = matcher([b"xa\xc3"], ["a"])
    assert feed(stop_matcher, 1) == [""]
    assert stop_matcher.close(Finish.LENGTH) == "x"
    assert stop_matcher.finish is Finish.STOP


def test_nothing_comes_after_the_end():
    stop_matcher = matcher([b"ab", b"c", b"d"], ["b"])
    assert feed(stop_matcher, 3) == ["a", "", ""]
    assert stop_matcher.close(Finish.LENGTH) == ""
    assert (stop_matcher.finish, stop_matcher.characters) == (Finish.STOP, 1)


def test_a_prompt_is_not_searched():
    stop_matcher = matcher([b"a", b"b"], ["ab"], prompt_ids=[0])
    assert stop_matcher.push(1) == "b"
    assert stop_matcher.finish is None


def test_without_a_tokenizer_tokens_still_stop():
    stop_matcher = StopMatcher(StopConditions(stop_ids=frozenset([7]), max_new_tokens=5), None)
    assert [stop_matcher.push(token) for token in (3, 7)] == ["", ""]
    assert (stop_matcher.finish, stop_matcher.characters) == (Finish.STOP, 0)


def test_stop_strings_without_a_tokenizer():
    with pytest.raises(UserError, match="stop strings need a tokenizer to find them by; give one, or use stop_ids"):
        StopMatcher(StopConditions(stop_strings=("a",), max_new_tokens=1), None)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"stop_strings": ("a", "")}, "a stop string is empty, so every text would end at once; leave it out"),
        ({"stop_strings": "User:"}, r"stop_strings must be a list of strings; write \['User:'\]"),
        ({"stop_ids": {4, -1}}, "stop id -1 is negative; ids of tokens count from 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ],
)
def test_bad_conditions(conditions, message):
    with pytest.raises(UserError, match=message):
        StopConditions(**{"max_new_tokens": 1, **conditions})
