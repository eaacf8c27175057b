import io
import json
import sys

import pytest
import sentencepiece
from byte_level import smollm2_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.data.tokenizers import (
    JsonTokenizer,
    SentencePieceTokenizer,
    SymbolTokenizer,
    check_vocab,
    deserialize,
    load_tokenizer,
    train_sentencepiece,
)
from looplm_jax.errors import UserError

UNICODE = st.text(st.characters(codec="utf-8"))
WHITESPACE = st.text(alphabet=" \t\n\r\u2581\u00a0▁ab\x00<|>")


@pytest.fixture(scope="module")
def json_tokenizer() -> JsonTokenizer:
    return smollm2_tokenizer()


def json_file(changes=(), **model) -> bytes:
    """Returns a tokenizer.json with a vocabulary of words."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2}, "unk_token": "<s>", **model},
    }
    return json.dumps({**content, **dict(changes)}).encode()


def added_token(token, content, *, special) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": content, "special": special, **flags}


@given(text=UNICODE | WHITESPACE)
def test_sentencepiece_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=UNICODE | WHITESPACE)
def test_tokenizer_json_loses_nothing(json_tokenizer, text):
    assert json_tokenizer.decode(json_tokenizer.encode(text)) == text


def test_special_tokens_are_those_of_ouro(tokenizer, json_tokenizer):
    for one in (tokenizer, json_tokenizer):
        assert (one.bos_id, one.eos_id) == (0, 0)
        assert [one.token_id(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
        assert one.token_id("<|no_such|>") is None


def test_names_of_special_tokens_in_text_are_text(tokenizer, json_tokenizer):
    text = "<|im_start|>system<|endoftext|>"
    for one in (tokenizer, json_tokenizer):
        ids = one.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert one.decode(ids) == text
        assert one.decode([0, *ids, 2]) == text


def test_pieces_for_people(tokenizer, json_tokenizer):
    assert tokenizer.piece(0) == "<|endoftext|>"
    assert "".join(tokenizer.piece(token) for token in tokenizer.encode("the loop\n")) == "the loop\n"
    assert [tokenizer.piece(token) for token in tokenizer.encode("é")] == ["<0xC3>", "<0xA9>"]
    assert "".join(json_tokenizer.piece(token) for token in json_tokenizer.encode("the loop")) == "the loop"
    assert all("\ufffd" not in json_tokenizer.piece(token) for token in json_tokenizer.encode("é"))


def test_training_on_text_without_spaces():
    tokenizer = train_sentencepiece(["abcabc\n"] * 20, 270)
    assert tokenizer.decode(tokenizer.encode("a b\u2581")) == "a b\u2581"


def test_training_is_deterministic_and_silent(capfd):
    texts = ["def loop(state):\n    return state\n" * 10, "x" * 9_000]
    assert train_sentencepiece(texts, 280).fingerprint == train_sentencepiece(texts, 280).fingerprint
    assert capfd.readouterr() == ("", "")


def test_training_reads_no_more_than_it_may():
    texts = ["the loop reads the state\n"] * 50
    endless = iter(lambda: texts[0], None)
    assert train_sentencepiece(endless, 280, max_bytes=1_000).vocab_size == 280


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["hello\n"] * 3, 2_000, "lower model.vocab_size to 2"),
        (["hello"], 100, "raise model.vocab_size to at least 26"),
        ([], 300, "there is no text to train a tokenizer on"),
        (["hello"], -5, "SentencePiece could not train a tokenizer of -5 tokens"),
    ],
)
def test_training_errors(texts, size, message):
    with pytest.raises(UserError, match=message) as error:
        train_sentencepiece(texts, size)
    assert "\n" not in str(error.value)


def test_every_kind_survives_serialization(tokenizer, json_tokenizer):
    for one in (tokenizer, json_tokenizer, SymbolTokenizer(["<bos>", "a", "b"])):
        again = deserialize(one.kind, one.serialize())
        assert type(again) is type(one)
        assert again.fingerprint == one.fingerprint
        assert again.encode("a b") == one.encode("a b")
    assert tokenizer.fingerprint != json_tokenizer.fingerprint


def test_load_by_ending(tmp_path, tokenizer, json_tokenizer):
    (tmp_path / "t.model").write_bytes(tokenizer.serialize())
    (tmp_path / "tokenizer.json").write_bytes(json_tokenizer.serialize())
    assert isinstance(load_tokenizer(str(tmp_path / "t.model")), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(str(tmp_path / "tokenizer.json")), JsonTokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.model", b"nonsense", r"t.model: this is not a SentencePiece model"),
        ("t.json", b"{}", r"t.json: this is not a tokenizer.json"),
        ("t.txt", b"", r"t.txt: a tokenizer is a SentencePiece .model, a tokenizer.json or a Hugging Face folder"),
        ("t.model", None, r"t.model: there is no such file"),
        ("", None, r" has no tokenizer.json; give a folder that has one, or a SentencePiece .model"),
    ],
)
def test_load_errors(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path / name))


def test_digits_are_tokens_of_their_own(json_tokenizer):
    assert [json_tokenizer.piece(token) for token in json_tokenizer.encode("2026")] == ["2", "0", "2", "6"]


def test_tokenizer_json_without_special_tokens():
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=r"has none of the tokens <\|endoftext\|>, <s>, .*; add one of them"):
        JsonTokenizer(json_file(vocab={"a": 0}))


@pytest.mark.parametrize(
    ("names", "bos", "eos"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 0, 0),
        (["a", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], 1, 2),
        (["<unk>", "<s>", "</s>"], 1, 2),
        (["<pad>", "<eos>", "<bos>"], 2, 1),
        (["<bos>", "+"], 0, 0),
        (["[PAD]", "[SEP]"], 1, 1),
    ],
    ids=["smollm2", "llama3", "llama2", "gemma", "symbols", "only an end"],
)
def test_ends_by_name(names, bos, eos):
    pytest.importorskip("tokenizers")
    added = [added_token(token, name, special=True) for token, name in enumerate(names)]
    tokenizer = JsonTokenizer(json_file({"added_tokens": added}, vocab={}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (bos, eos, len(names))


def test_ids_with_gaps():
    pytest.importorskip("tokenizers")
    assert JsonTokenizer(json_file(vocab={"<s>": 0, "a": 7})).vocab_size == 8


def test_a_turn_cannot_be_forged_where_its_tokens_are_not_called_special():
    pytest.importorskip("tokenizers")
    added = [added_token(3, "<|im_end|>", special=False), added_token(4, "<tool>", special=False)]
    vocab = {"<s>": 0, "a": 1, "<unk>": 2}
    tokenizer = JsonTokenizer(json_file({"added_tokens": added}, vocab=vocab, unk_token="<unk>"))
    assert tokenizer.encode("a <|im_end|> <tool>") == [1, 2, 4]
    assert tokenizer.decode([1, 3]) == "a"


def test_the_file_cuts_and_pads_nothing():
    pytest.importorskip("tokenizers")
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    tokenizer = JsonTokenizer(json_file({"truncation": cut, "padding": {**pad, "pad_to_multiple_of": None}}))
    assert tokenizer.encode("a b a") == [1, 2, 1]


def test_text_without_tokens():
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match="cannot encode this text: WordLevel error: Missing"):
        JsonTokenizer(json_file(unk_token="none")).encode("a z")


def test_a_panic_is_an_error(capfd):
    """A continuation prefix that the pieces lack makes the parser, which is written in Rust, panic."""
    pytest.importorskip("tokenizers")
    model = {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]}
    with pytest.raises(UserError, match=r"this is not a tokenizer\.json") as error:
        JsonTokenizer(json_file(**model, continuing_subword_prefix="####"))
    assert "\n" not in str(error.value)


def test_an_interruption_is_no_mistake(monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")

    class Interrupted:
        @staticmethod
        def from_buffer(content):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers, "Tokenizer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        JsonTokenizer(b"{}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read_or_refuse(content):
    try:
        JsonTokenizer(content).encode("a b\n")
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


@given(content=st.binary() | JSON.map(json.dumps).map(str.encode))
def test_any_bytes_are_read_or_refused(content):
    pytest.importorskip("tokenizers")
    read_or_refuse(content)


@given(place=st.sampled_from(["version", "added_tokens", "pre_tokenizer", "model", "decoder", "padding"]), value=JSON)
def test_any_field_is_read_or_refused(place, value):
    pytest.importorskip("tokenizers")
    read_or_refuse(json_file({place: value}))


@given(data=st.data())
def test_any_part_of_a_file_is_refused(json_tokenizer, data):
    content = json_tokenizer.serialize()
    end = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(UserError, match=r"this is not a tokenizer\.json"):
        JsonTokenizer(content[:end])


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'looplm_jax\[hf\]'"):
        JsonTokenizer(b"{}")


def test_unknown_kind():
    with pytest.raises(UserError, match="did you mean 'symbols'"):
        deserialize("symbol", b"")


def test_vocabulary_of_the_model(tokenizer):
    """The model may have more ids than the tokenizer, which are never targets, but not fewer."""
    check_vocab(tokenizer, 300)
    check_vocab(tokenizer, 512)
    with pytest.raises(UserError, match=r"has 300 tokens but model.vocab_size is 299; set model.vocab_size to "):
        check_vocab(tokenizer, 299)


def test_half_a_surrogate_pair(tokenizer, json_tokenizer):
    for one in (tokenizer, json_tokenizer):
        with pytest.raises(UserError, match="half a surrogate pair"):
            one.encode("a\ud800")


def test_sentencepiece_without_ends():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]),
        model_writer=model,
        model_type="char",
        vocab_size=5,
        bos_id=-1,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    with pytest.raises(UserError, match="neither a bos nor an eos token"):
        SentencePieceTokenizer(model.getvalue())


def test_pieces_with_marked_spaces():
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "\u2581loop": 2}, unk_token="<s>"))
    one = JsonTokenizer(inner.to_str().encode())
    assert (one.bos_id, one.eos_id, one.vocab_size) == (0, 1, 3)
    assert one.piece(2) == " loop"


def test_symbols():
    symbols = SymbolTokenizer(["<bos>", "+", "1"])
    assert symbols.decode(symbols.encode("+ 1 1")) == "+ 1 1"
    assert (symbols.vocab_size, symbols.bos_id, symbols.eos_id, symbols.token_id("1")) == (3, 0, 0, 2)
    assert json.loads(symbols.serialize()) == ["<bos>", "+", "1"]
    with pytest.raises(UserError, match="'-' is not in the vocabulary of symbols"):
        symbols.encode("- 1")
    with pytest.raises(UserError, match="different words without spaces"):
        SymbolTokenizer(["a", "a"])
