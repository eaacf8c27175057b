"""No text produces a special token, with any kind of tokenizer, unless this is requested."""

import io
import itertools
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm_jax.data import Message, tokens_and_mask
from looplm_jax.data.tokenizers import JsonTokenizer, SentencePieceTokenizer, SymbolTokenizer
from looplm_jax.errors import UserError

tokenizers = pytest.importorskip("tokenizers")

STRUCTURE = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[MASK]", "<start_of_turn>")
UNKNOWN = "<unk>"
NAMES = (*STRUCTURE, UNKNOWN)
WORDS = ("the", "loop", "a", "b", "<", ">", "|", "_", "im", "end")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHARACTERS = sorted({*"".join(NAMES), *"abcdefghijklmnopqrstuvwxyz "})

# Includes other normal forms and cases of the names, which a normalizer maps to the names themselves.
WIDE = {ord(character): ord(character) + 0xFEE0 for character in "<>|/[]"}
FORGED = [*NAMES, *(name.translate(WIDE) for name in NAMES), *(name.upper() for name in NAMES)]
PARTS = st.sampled_from([*FORGED, *WORDS, " ", "  ", "\n", "\u2581", "<|im_", "end|>", "s>"])
TEXTS = st.lists(PARTS | st.text(st.characters(codec="utf-8"), max_size=3), max_size=8).map("".join)


def byte_alphabet() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def word_model(unknown, words):
    return {"type": "WordLevel", "vocab": {piece: place for place, piece in enumerate(words)}, "unk_token": unknown}


def models(named):
    """Returns every kind of model with these names in its vocabulary, with its pre-tokenizer and decoder."""
    wide = {"type": "NFKC"}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    words = {"type": "WhitespaceSplit"}
    pairs = list(itertools.pairwise(["<s>"]))

    def bpe(alphabet, **settings):
        vocab = {piece: place for place, piece in enumerate([*named, *alphabet])}
        merges = [list(pair) for pair in pairs]
        empty = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        return {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": None, **empty, **settings}

    merged = bpe([*byte_alphabet(), "<s"])
    merged["merges"] = [["<", "s"]] + ([["<s", ">"]] if "<s>" in named else [])
    scores = [[piece, 0.0 if piece in named else -10.0] for piece in [*named, UNKNOWN, *BYTES, *CHARACTERS, "\u2581"]]
    scores = [list(pair) for pair in dict(scores).items()]
    unigram = {"type": "Unigram", "vocab": scores, "unk_id": [piece for piece, _ in scores].index(UNKNOWN)}
    known = list(dict.fromkeys([*named, UNKNOWN, *WORDS, *CHARACTERS[1:], *(f"##{c}" for c in CHARACTERS[1:])]))
    piece = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return {
        "byte-level": {"model": merged, "pre_tokenizer": byte_level, "decoder": byte_level},
        "whole words first": {
            "model": bpe(byte_alphabet(), ignore_merges=True),
            "pre_tokenizer": {**byte_level, "use_regex": False},
            "decoder": byte_level,
        },
        "byte fallback": {
            "model": bpe([*BYTES, *CHARACTERS, "\u2581", UNKNOWN], byte_fallback=True, ignore_merges=True),
            "pre_tokenizer": metaspace,
        },
        "unigram": {"model": {**unigram, "byte_fallback": False}, "pre_tokenizer": metaspace},
        "normalized unigram": {
            "model": {**unigram, "byte_fallback": True},
            "pre_tokenizer": metaspace,
            "normalizer": wide,
        },
        "words": {"model": word_model(UNKNOWN, known), "pre_tokenizer": words},
        "normalized words": {"model": word_model(UNKNOWN, known), "pre_tokenizer": words, "normalizer": wide},
        "unknown words are refused": {"model": word_model("none", known), "pre_tokenizer": words},
        "unknown words are ends": {"model": word_model("</s>", known), "pre_tokenizer": words},
        "word pieces": {
            "model": {**piece, "vocab": word_model("", known)["vocab"], "unk_token": UNKNOWN},
            "pre_tokenizer": words,
            "normalizer": {"type": "Sequence", "normalizers": [wide, {"type": "Lowercase"}]},
        },
    }


LOSSLESS = ("byte-level", "whole words first")
HOW = ("called special", "added", "in the vocabulary", "stripping")


def tokenizer_json(kind: str, how: str) -> bytes:
    """Returns a file whose special tokens are marked as such, only added, only words of the model, or strip spaces."""
    file = models(NAMES)[kind]
    vocab = file["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece: place for place, (piece, _) in enumerate(vocab)}
    strips, normalized = how == "stripping", how == "added"
    flags = {"single_word": False, "lstrip": strips, "rstrip": strips, "normalized": normalized}
    special = how != "added"
    added = [{"id": ids[name], "content": name, "special": special, **flags} for name in NAMES if name in ids]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}},
    }
    content = {"version": "1.0", "added_tokens": [] if how == HOW[2] else added, "post_processor": template, **file}
    return json.dumps(content).encode()


def sentencepiece_model(algorithm: str, **pieces) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the loop reads the state", "".join(CHARACTERS), " ".join(NAMES)] * 20),
        model_writer=model,
        model_type=algorithm,
        vocab_size=350,
        pad_id=3,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
        **pieces,
    )
    return model.getvalue()


CASES = [
    *(
        pytest.param(JsonTokenizer(tokenizer_json(kind, how)), kind, id=f"{kind}, {how}")
        for kind in models(NAMES)
        for how in HOW
    ),
    *(
        pytest.param(
            SentencePieceTokenizer(sentencepiece_model(algorithm, **{place: list(STRUCTURE[3:])})),
            "",
            id=f"{algorithm}, {place}",
        )
        for algorithm in ("bpe", "unigram")
        for place in ("control_symbols", "user_defined_symbols")
    ),
]
JSON_CASES = [case for case in CASES if isinstance(case.values[0], JsonTokenizer)]


def structure_of(tokenizer) -> set[int]:
    ids = [tokenizer.token_id(name) for name in STRUCTURE]
    assert None not in ids
    return set(ids)


@settings(max_examples=400)
@given(case=st.sampled_from(CASES), text=TEXTS)
def test_no_text_gives_a_special_token(case, text):
    one, kind = case.values
    try:
        ids = one.encode(text)
    except UserError as error:
        assert kind.startswith("unknown words")
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert structure_of(one).isdisjoint(ids)
    if kind in LOSSLESS:
        assert one.decode(ids) == text


@settings(max_examples=200)
@given(case=st.sampled_from(JSON_CASES), text=TEXTS)
def test_other_texts_are_encoded_as_by_the_library(case, text):
    one, _ = case.values
    library = tokenizers.Tokenizer.from_buffer(one.serialize())
    try:
        theirs = library.encode(text, add_special_tokens=False).ids
    except Exception:
        return
    if {*structure_of(one), one.token_id(UNKNOWN)}.isdisjoint(theirs):
        assert one.encode(text) == theirs


@pytest.mark.parametrize(("one", "kind"), [case for case in CASES if not case.id.endswith(HOW[2])])
def test_names_are_parsed_where_that_is_asked_for(one, kind):
    for name in STRUCTURE:
        assert one.token_id(name) in one.encode(f"a {name} b", special=True)


@settings(max_examples=200)
@given(case=st.sampled_from(CASES), contents=st.lists(TEXTS, min_size=1, max_size=3))
def test_a_chat_has_the_structure_of_its_template(case, contents):
    one, _ = case.values
    roles = itertools.cycle(["system", "user", "assistant"])
    try:
        tokens = tokens_and_mask(map(Message, roles, contents), one).tokens.tolist()
    except UserError:
        return
    structure = [token for token in tokens if token in structure_of(one)]
    assert structure == [one.token_id("<|im_start|>"), one.token_id("<|im_end|>")] * len(contents)


def test_the_first_symbol_is_special():
    symbols = SymbolTokenizer(["<bos>", "a"])
    assert symbols.encode("<bos> a", special=True) == [0, 1]
    with pytest.raises(UserError, match="only as the special token <bos>, which plain text never becomes; change"):
        symbols.encode("a <bos>")


@pytest.mark.parametrize("unknown", ["</s>", "none"])
def test_words_that_are_special_alone_are_refused(unknown):
    vocab = {"</s>": 0, "a": 1}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}
    one = JsonTokenizer(json.dumps({"version": "1.0", "model": model}).encode())
    assert one.encode("a") == [1]
    with pytest.raises(UserError, match="part of the text only as the special token </s>") as error:
        one.encode("</s>")
    assert "\n" not in str(error.value)
