import contextlib
import json
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece_cases import VERBATIM, merged, model_bytes

from looplm_jax.convert._sentencepiece_json import PieceKind, read_model, sentencepiece_json
from looplm_jax.data.tokenizers import JsonTokenizer, SentencePieceTokenizer, train_sentencepiece
from looplm_jax.errors import UserError

pytest.importorskip("tokenizers")

LIBRARY = Path(sysconfig.get_path("stdlib"))
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>", "<0x0A>", "<0x0a>"]
AWKWARD = [
    "\u2581",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\x00",
    "\x1b",
    "\u00a0",
    "\u200d",
    "\ufeff",
    "\ufffd",
    "é",
    "e\u0301",
    "👩‍🚀",
]
SPACE = ("\u2581", -8.0, PieceKind.NORMAL)
WHOLE = model_bytes(merged(["ab", "\u2581"]))
UNICODE = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def pair() -> tuple[SentencePieceTokenizer, JsonTokenizer]:
    """Returns a tokenizer trained on the standard library's text, and its exported form."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.glob("*.py"))[:40]]
    ours = train_sentencepiece(texts, 1024, max_bytes=500_000)
    return ours, JsonTokenizer(sentencepiece_json(ours.serialize()))


def pairs_of(content: bytes) -> tuple[SentencePieceTokenizer, JsonTokenizer]:
    return SentencePieceTokenizer(content), JsonTokenizer(sentencepiece_json(content))


def assert_same(ours, theirs, text):
    ids = ours.encode(text)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == ours.decode(ids) == text


@given(text=UNICODE)
def test_same_ids_for_any_text(pair, text):
    assert_same(*pair, text)


@given(data=st.data())
def test_same_ids_for_pieces_in_any_order(pair, data):
    pieces = [pair[0].piece(token) for token in range(260, pair[0].vocab_size)]
    parts = st.lists(st.sampled_from(pieces + AWKWARD + NAMES), max_size=30)
    assert_same(*pair, "".join(data.draw(parts)))


@pytest.mark.parametrize("text", ["", *NAMES, *AWKWARD])
def test_same_ids_for_awkward_text(pair, text):
    assert_same(*pair, text)
    assert_same(*pair, f"a{text}{text} b")


def test_same_ids_for_real_text(pair):
    paths = sorted(LIBRARY.glob("*.py"))[40:120:2]
    assert len(paths) > 20
    for path in paths:
        assert_same(*pair, path.read_bytes().decode())


@given(data=st.data())
def test_same_ids_for_any_vocabulary(data):
    """One merge per piece suffices, even for pieces in an order that no training produces."""
    word = st.text("ab ", min_size=2, max_size=6)
    texts = data.draw(st.lists(word, min_size=1, max_size=12, unique=True))
    content = model_bytes(merged([text.replace(" ", "\u2581") for text in [*texts, "a", "b", " "]]))
    ours, theirs = pairs_of(content)
    for text in data.draw(st.lists(st.text("ab c", max_size=40), max_size=8)):
        assert_same(ours, theirs, text)


def test_a_piece_that_no_text_gives_has_no_merge():
    content = json.loads(sentencepiece_json(model_bytes(merged(["ab", "bc", "abcd", "bcd", "\u2581"]))))
    assert content["model"]["merges"] == [["a", "b"], ["b", "c"], ["bc", "d"]]


@given(ids=st.lists(st.integers(0, 1023).filter(lambda token: token != 3), max_size=30))
def test_same_text_for_any_ids_whose_bytes_are_unicode(pair, ids):
    """Hugging Face's decoder maps a run of bytes to one character sequence or none, hence no incomplete bytes here."""
    ours, theirs = pair
    whole = [token for token in ids if not ours.piece(token).startswith("<0x")]
    assert theirs.decode(whole) == ours.decode(whole)


def test_same_tokens_by_name(pair):
    ours, theirs = pair
    assert (theirs.bos_id, theirs.eos_id, theirs.vocab_size) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    assert [theirs.token_id(name) for name in NAMES[:3]] == [ours.token_id(name) for name in NAMES[:3]] == [0, 1, 2]
    assert all(theirs.piece(token) == ours.piece(token) for token in range(260, ours.vocab_size))


@given(text=st.text("ab<tool> \n\u2581", max_size=30) | st.lists(st.sampled_from(["<tool>", "a", "b "])).map("".join))
def test_user_defined_symbols(text):
    pieces = [
        *merged(["ab", "<t", "l>", "\u2581"]),
        ("<tool>", 0.0, PieceKind.USER_DEFINED),
        ("\n", 0.0, PieceKind.USER_DEFINED),
    ]
    assert_same(*pairs_of(model_bytes(pieces)), text)


def test_the_reader_agrees_with_sentencepiece(pair):
    ours, _ = pair
    processor = sentencepiece.SentencePieceProcessor(model_proto=ours.serialize())
    pieces = read_model(ours.serialize()).pieces
    ids = range(len(pieces))
    assert [piece.text for piece in pieces] == [processor.id_to_piece(token) for token in ids]
    assert [piece.score for piece in pieces] == [processor.get_score(token) for token in ids]
    for kind, has in {PieceKind.CONTROL: processor.is_control, PieceKind.BYTE: processor.is_byte}.items():
        assert [piece.kind is kind for piece in pieces] == [has(token) for token in ids]


@given(content=st.binary(max_size=200) | st.integers(0, len(WHOLE)).map(lambda end: WHOLE[:end]))
def test_the_reader_takes_any_bytes(content):
    with contextlib.suppress(UserError):
        read_model(content)


@pytest.mark.parametrize(
    ("trainer", "normalizer", "message"),
    [
        ({3: 1, 35: 1}, VERBATIM, "model_type unigram, and only with bpe"),
        ({3: 2}, VERBATIM, "byte_fallback false, and only with true"),
        ({3: 2, 35: 1}, {**VERBATIM, 2: b"rules"}, "normalization_rules true"),
        ({3: 2, 35: 1}, {**VERBATIM, 3: 1}, "add_dummy_prefix true"),
        ({3: 2, 35: 1}, {**VERBATIM, 4: 1}, "remove_extra_whitespaces true"),
        ({3: 2, 35: 1}, {**VERBATIM, 5: 0}, "escape_whitespaces false"),
        ({3: 2, 35: 1}, {}, "add_dummy_prefix true"),
    ],
)
def test_refused_settings(trainer, normalizer, message):
    with pytest.raises(UserError, match=message) as error:
        sentencepiece_json(model_bytes(merged(["ab"]), trainer, normalizer))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "there is no piece for the space"),
        ([SPACE, ("ab", -9.0, PieceKind.UNUSED)], "the piece 'ab' is marked as unused"),
        ([SPACE, (" ", -9.0, PieceKind.NORMAL)], "the piece ' ' is there twice"),
        ([SPACE, ("<0xe2>", -9.0, PieceKind.NORMAL)], "the piece '<0xe2>' looks like a byte"),
        (
            [SPACE, ("bb", -9.0, PieceKind.NORMAL), ("aa", -9.0, PieceKind.NORMAL)],
            "the piece 'bb' has the score of another",
        ),
        ([SPACE, ("az", -9.0, PieceKind.NORMAL)], "the piece 'az' has a character without a piece of its own"),
    ],
)
def test_refused_pieces(pieces, message):
    characters = [(character, -20.0, PieceKind.NORMAL) for character in "ab<0xe2>"]
    with pytest.raises(UserError, match=message) as error:
        sentencepiece_json(model_bytes([*dict.fromkeys(characters), *pieces]))
    assert "\n" not in str(error.value)
