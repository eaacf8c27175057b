import numpy as np
import pytest
from data_helpers import make_texts, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import DataConfig, OnBadRecord, SourceConfig
from looplm_jax.data import open_corpus
from looplm_jax.data._documents import document_key, is_validation, split_documents
from looplm_jax.errors import UserError


@given(texts=st.lists(st.text(st.characters(codec="utf-8"))), fraction=st.floats(0, 1, exclude_max=True))
def test_split_is_a_property_of_each_text(texts, fraction):
    split = split_documents(np.array([document_key(text) for text in texts], np.uint64), fraction)
    assert sorted([*split.train, *split.validation]) == list(range(len(texts)))
    assert all(is_validation(texts[index], fraction) for index in split.validation)
    assert not any(is_validation(texts[index], fraction) for index in split.train)


def test_more_is_held_out_never_other():
    texts = make_texts(300)
    small, large = ({text for text in texts if is_validation(text, fraction)} for fraction in (0.05, 0.2))
    assert small < large
    assert 30 < len(large) < 90


def test_layout_of_files_does_not_matter(tmp_path):
    texts = make_texts(100)
    write_jsonl(tmp_path / "one.jsonl", texts)
    write_jsonl(tmp_path / "split_b.jsonl", texts[:30][::-1])
    write_jsonl(tmp_path / "split_a.jsonl", texts[30:])

    def held_out(pattern):
        corpus = open_corpus(DataConfig(sources=(SourceConfig(path=str(tmp_path / pattern)),), validation_fraction=0.1))
        records = corpus.sources[0].validation()
        assert corpus.validation_documents == len(records) > 0
        assert corpus.train_documents == 100 - len(records)
        return [records[index] for index in range(len(records))]

    assert held_out("one.jsonl") == held_out("split_*.jsonl")


def test_skipped_records_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('nonsense\n{"text": "good"}\n[]\n')
    sources = (SourceConfig(path=str(path)),)
    corpus = open_corpus(DataConfig(sources=sources, validation_fraction=0, on_bad_record=OnBadRecord.SKIP))
    assert (corpus.skipped, corpus.train_documents) == (2, 1)


def test_no_source():
    with pytest.raises(UserError, match=r"data.sources is empty; say what to train on"):
        open_corpus(DataConfig())


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (1e-9, "none of the 3 documents is held out at data.validation_fraction=1e-09; raise it, give more documents"),
        (1 - 1e-9, "all 3 documents are held out for validation; lower data.validation_fraction"),
    ],
)
def test_empty_part(tmp_path, fraction, message):
    path = str(write_jsonl(tmp_path / "a.jsonl", make_texts(3)))
    with pytest.raises(UserError, match=message):
        open_corpus(DataConfig(sources=(SourceConfig(path=path),), validation_fraction=fraction))
