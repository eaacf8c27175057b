"""Decontamination: what must be found, and what must not."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cleaning_cases import SEPARATORS, evaluation, word_lists
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from looplm_jax.corpus import load_evaluation_ngrams
from looplm_jax.corpus._evaluation_texts import SHORTEST, ngram_length
from looplm_jax.corpus._words import length_in_words, words
from looplm_jax.errors import UserError

many_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def _long_enough(item: list[str]) -> bool:
    return length_in_words(words(" ".join(item))) >= SHORTEST


@many_files
@given(word_lists().filter(_long_enough), word_lists(least=0), word_lists(least=0))
def test_an_item_that_stands_in_a_text_is_found_whole(tmp_path, item, before, after):
    text = " ".join([*before, *item, *after])
    [match] = evaluation(tmp_path, " ".join(item)).overlap(text).matches
    assert match.share == 1
    assert match.words == len(words(" ".join(item)))


@many_files
@given(word_lists("abcdeéøжщω"), st.lists(st.sampled_from(SEPARATORS), min_size=60, max_size=60), st.randoms())
def test_case_and_punctuation_are_no_difference(tmp_path, item, separators, random):
    changed = [random.choice((str.upper, str.title, str.lower))(word) for word in item]
    text = "".join(word + separator for word, separator in zip(changed, separators))
    [match] = evaluation(tmp_path, " ".join(item)).overlap(f"Q: {text}?").matches
    assert match.share == 1


@many_files
@given(word_lists("abcde中ไ").filter(_long_enough), word_lists("fghij文ท", least=0, most=200), st.integers(2, 20))
def test_texts_without_a_common_word_never_overlap(tmp_path, item, text, n):
    assert evaluation(tmp_path, " ".join(item), n=n).overlap(" ".join(text)) is None


@many_files
@given(st.integers(14, 40), st.integers(2, 20), st.data())
def test_n_words_in_a_row_are_found_and_fewer_are_not(tmp_path, length, n, data):
    item = [f"word{i}" for i in range(length)]
    ngrams = evaluation(tmp_path, " ".join(item), n=n)
    shared = data.draw(st.integers(0, length))
    start = data.draw(st.integers(0, length - shared))
    overlap = ngrams.overlap(" ".join(["before", *item[start : start + shared], "after"]))
    assert (overlap is not None) == (shared >= min(n, length))
    if overlap:
        [match] = overlap.matches
        assert match.words == shared
        assert match.share == pytest.approx(shared / length)
        assert match.excerpt.split() == item[start : start + shared][:30]


def test_a_short_item_is_looked_for_whole_and_a_shorter_one_not_at_all(tmp_path):
    ten, seven = [f"ten{i}" for i in range(10)], [f"seven{i}" for i in range(7)]
    ngrams = evaluation(tmp_path, " ".join(ten), " ".join(seven))
    [file] = ngrams.files
    assert (file.items, file.too_short) == (2, 1)
    assert ngrams.overlap(" ".join(ten[:9])) is None
    assert ngrams.overlap(" ".join(seven)) is None
    assert ngrams.overlap(" ".join(ten)).matches[0].share == 1


def test_characters_are_the_words_of_scripts_without_spaces():
    assert words("「東京」は、Tokyo です。") == ["東", "京", "は", "tokyo", "で", "す"]
    assert words("ไป ไหน") == list("ไปไหน")
    assert words("Don’t naïve-ly CO-OP\u00ad ﬁne ½_x") == ["dont", "naïve", "ly", "co", "op", "fine", "1", "2", "x"]
    assert words("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]


@pytest.mark.parametrize(("text", "window"), [("東" * 60, 26), ("ไ" * 80, 52), ("东" * 15, 0), ("东" * 16, 16)])
def test_an_ngram_of_words_is_several_times_as_many_characters(text, window):
    assert ngram_length(words(text), 13) == window


def test_an_item_is_one_item_whatever_many_texts_it_has(tmp_path):
    question, choices = [f"q{i}" for i in range(20)], [" ".join(f"c{i}{j}" for j in range(10)) for i in range(3)]
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps({"question": " ".join(question), "choices": {"text": choices}, "answer": 2}))
    ngrams = load_evaluation_ngrams([str(path)])
    [match] = ngrams.overlap(f"{' '.join(question)}? {choices[1]}").matches
    assert (match.words, match.share) == (20, pytest.approx(30 / 50))
    only_question = load_evaluation_ngrams([str(path)], key="question")
    assert only_question.overlap(choices[1]) is None
    assert only_question.overlap(" ".join(question)).matches[0].share == 1


def test_matches_come_longest_first_and_repeated_words_cost_little(tmp_path):
    item, longer = "same " * 500, " ".join(f"other{i}" for i in range(700))
    overlap = evaluation(tmp_path, item, longer).overlap(f"{'same ' * 20_000} {longer}")
    assert [(match.line, match.words, match.share) for match in overlap.matches] == [(2, 700, 1), (1, 500, 1)]


PROGRAM = """
import json, pickle, sys
ngrams, text = pickle.load(open(sys.argv[1], "rb"))
import dataclasses
print(json.dumps(dataclasses.asdict(ngrams.overlap(text))))
from looplm_jax.corpus import NearDuplicates
print(NearDuplicates().signature(text).tobytes().hex())
assert "jax" not in sys.modules, "a worker needs no jax"
"""


def test_another_process_says_the_same_and_imports_no_jax(tmp_path):
    from looplm_jax.corpus import NearDuplicates

    item = " ".join(f"word{i}" for i in range(40))
    ngrams, text = evaluation(tmp_path, item), f"before {item} after"
    pickled = tmp_path / "ngrams.pickle"
    pickled.write_bytes(pickle.dumps((ngrams, text)))
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM, pickled], env=environment, capture_output=True, check=True)
    overlap, signature = ran.stdout.decode().splitlines()
    assert json.loads(overlap)["matches"][0]["words"] == 40
    assert np.array_equal(np.frombuffer(bytes.fromhex(signature), np.uint32), NearDuplicates().signature(text))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text", "an evaluation file is .jsonl or .txt with one item a line"),
        ("a.txt", b" \n\n", "holds no text to look for"),
        ("a.jsonl", b'{"answer": 3}', "holds no text to look for"),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt:2: not UTF-8 at byte 0 of the line"),
        ("a.jsonl", b'{"q": "fine"}\n{"q": \n', "a.jsonl:2: not JSON (Expecting value at column 6)"),
        ("a.jsonl", b'["text"]', "a.jsonl:1: not a JSON object but list"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON that can be read (nested too deep"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_evaluation_ngrams([str(path)])
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_arguments_are_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        load_evaluation_ngrams([str(tmp_path / "nothing.txt")])
    with pytest.raises(UserError, match="n-grams of 1 words would match everything"):
        evaluation(tmp_path, "one two", n=1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "what"}')
    with pytest.raises(UserError, match=r"a.jsonl:1: the item has no field 'questoin'; did you mean 'question'\?"):
        load_evaluation_ngrams([str(path)], key="questoin")
