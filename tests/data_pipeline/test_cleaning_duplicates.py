"""Near-duplicates: what is dropped, what is kept, and by which criterion."""

import itertools
import sys

import numpy as np
import pytest
from cleaning_cases import word_lists
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.corpus import DocumentPlace, Duplicates, DuplicatesReport, NearDuplicates
from looplm_jax.corpus._near_duplicates import band_width, shared_bands
from looplm_jax.errors import UserError

pytest.importorskip("datasketch")

TEXTS = st.lists(word_lists("abc", least=0, most=12).map(" ".join), min_size=1, max_size=12)


def _drop(texts: list[str], settings: NearDuplicates) -> Duplicates:
    return settings.drop(np.stack([settings.signature(text) for text in texts]))


def _similarity(settings: NearDuplicates, one: str, other: str) -> float:
    return float(np.mean(settings.signature(one) == settings.signature(other)))


@given(TEXTS, st.floats(0.3, 1))
def test_of_equal_texts_the_first_is_kept_and_every_other_dropped(texts, threshold):
    settings = NearDuplicates(threshold, permutations=32)
    copies = [*texts, *(text.upper() + " ?!" for text in texts if text)]
    duplicates = _drop(copies, settings)
    kept = [text for number, text in enumerate(texts) if number not in duplicates.dropped]
    assert duplicates.dropped >= set(range(len(texts), len(copies)))
    assert len(set(kept)) == len(kept)
    assert 0 not in duplicates.dropped


@given(TEXTS, st.floats(0.3, 1))
def test_what_is_dropped_is_like_an_earlier_text_that_is_kept(texts, threshold):
    settings = NearDuplicates(threshold, ngram=2, permutations=32)
    duplicates = _drop(texts, settings)
    for dropped, kept in duplicates.kept.items():
        assert kept < dropped
        assert kept not in duplicates.dropped
        assert _similarity(settings, texts[kept], texts[dropped]) >= threshold


@given(word_lists("abcde", least=30), word_lists("fghij文ท", least=30), st.floats(0.1, 1))
def test_texts_without_a_common_word_are_kept(one, other, threshold):
    assert not _drop([" ".join(one), " ".join(other)], NearDuplicates(threshold)).dropped


@given(st.permutations(range(6)))
def test_the_order_decides_which_is_kept_and_nothing_else(order):
    texts = [f"{shared} {' '.join(f'tail{i}{j}' for j in range(2))}" for i in range(3) for shared in _two_texts()]
    duplicates = _drop([texts[number] for number in order], NearDuplicates(0.8))
    groups = [number % 2 for number in order]
    assert set(range(6)) - duplicates.dropped == {groups.index(0), groups.index(1)}


def _two_texts() -> tuple[str, str]:
    return tuple(" ".join(f"{letter}{i}" for i in range(100)) for letter in "ab")  # type: ignore[return-value]


@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_bands_are_those_of_the_librarys_index(seed, documents):
    datasketch = pytest.importorskip("datasketch")
    random = np.random.default_rng(seed)
    signatures = random.integers(3, size=(documents, 8), dtype=np.uint32)
    width = band_width(0.5, 8)
    index = datasketch.MinHashLSH(num_perm=8, params=(8 // width, width))
    rows = [datasketch.MinHash(hashvalues=row, scheme="affine32") for row in signatures]
    for number, row in enumerate(rows):
        index.insert(number, row)
    shared = dict(shared_bands(signatures, 0.5))
    ours = {(one, other) for one, other in itertools.combinations(shared, 2) if set(shared[one]) & set(shared[other])}
    theirs = {(one, other) for one, row in enumerate(rows) for other in index.query(row) if one < other}
    assert ours == theirs


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_a_pair_at_the_threshold_is_a_candidate(threshold):
    width = band_width(threshold, 128)
    assert 1 - (1 - threshold**width) ** (128 // width) >= 0.95


@given(word_lists("ab", least=0, most=9), st.integers(1, 12))
def test_order_of_words_counts_and_every_text_has_a_signature(text, ngram):
    settings = NearDuplicates(ngram=ngram, permutations=16)
    assert settings.signature(" ".join(text)).shape == (16,)
    assert settings.signature("one two three").tolist() != settings.signature("three two one").tolist() or ngram == 1
    assert settings.signature("?!").tolist() != settings.signature("...").tolist()


def test_a_long_text_has_the_signature_of_its_ngrams_whatever_their_order():
    settings = NearDuplicates(ngram=1)
    words = [f"word{i}" for i in range(10_000)]
    assert settings.signature(" ".join(words)).tolist() == settings.signature(" ".join(words[::-1])).tolist()


def test_signatures_may_be_a_memory_map(tmp_path):
    settings = NearDuplicates()
    rows = np.stack([settings.signature(text) for text in ("a b c d e f", "x", "A, b c d e f")])
    mapped = np.memmap(tmp_path / "signatures", np.uint32, "w+", shape=rows.shape)
    mapped[:] = rows
    assert settings.drop(mapped).kept == {2: 0}


def test_nothing_is_dropped_of_nothing():
    assert NearDuplicates().drop(np.zeros((0, 128), np.uint32)) == Duplicates(documents=0, kept={})


def test_the_report_names_clusters_and_sources():
    duplicates = Duplicates(documents=9, kept={3: 0, 4: 0, 5: 2, 8: 0})
    report = DuplicatesReport.of(
        NearDuplicates(0.9), duplicates, lambda number: DocumentPlace(("books|old", "web")[number % 2], f"f:{number}")
    )
    assert report.to_json()["dropped_by_source"] == {"books|old": 2, "web": 2}
    assert [(size["at_least"], size["clusters"]) for size in report.to_json()["sizes"]] == [(2, 1), (3, 1)]
    text = report.to_markdown()
    assert "4 of 9 documents were dropped" in text
    assert "Like means that 90% of the 5-grams of words" in text
    assert "| f:0 | 3 | f:3, f:4, f:8 |" in text
    assert "| books\\|old | 2 |" in text


def test_bad_settings_and_a_missing_library_are_named_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="threshold is 80; give a similarity above 0, at most 1"):
        NearDuplicates(80)
    with pytest.raises(UserError, match="ngram is 0 and permutations 128; both must be at least 1"):
        NearDuplicates(ngram=0)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"pip install 'looplm_jax\[clean\]'"):
        NearDuplicates().check_installed()
