"""Hugging Face datasets, without the hub."""

import importlib
import json
import pickle
import subprocess
import sys
import tempfile

import pytest
from data_files import as_chat, every_way, write_dataset, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm_jax.config import DataConfig, RecordKind, SourceConfig
from looplm_jax.data import open_corpus
from looplm_jax.data.sources import _huggingface as huggingface
from looplm_jax.data.sources import find_inputs, open_files, spans
from looplm_jax.errors import UserError

datasets = pytest.importorskip("datasets")
TEXTS = ["first\n", "zwei — два", "", "three", "\u2028"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def fails(match, path, **fields):
    with pytest.raises(UserError, match=match) as error:
        open_files(SourceConfig(path=str(path), **fields))
    assert "\n" not in str(error.value)


def test_a_saved_dataset_gives_its_documents(tmp_path):
    write_dataset(tmp_path / "texts", TEXTS)
    assert every_way(tmp_path / "texts") == [text for text in TEXTS if text]
    chats = [as_chat("loop?", "state"), as_chat("why", "because", "and", "so")]
    write_dataset(tmp_path / "chats", chats)
    assert every_way(tmp_path / "chats", kind=RecordKind.CHAT) == chats


@given(documents=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=9))
@settings(max_examples=8)
def test_a_dataset_holds_any_text(documents):
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(f"{folder}/texts", documents)
        assert every_way(f"{folder}/texts") == [document for document in documents if document]


def test_a_dataset_by_name_and_split(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train.parquet", TEXTS[:2])
    write_parquet(tmp_path / "data" / "test.parquet", ["held out"])
    spec = f"huggingface:{tmp_path}/data,split="
    assert every_way(f"{spec}train") == TEXTS[:2]
    assert every_way(f"{spec}test") == ["held out"]
    corpus = open_corpus(
        DataConfig(sources=(SourceConfig(path=f"{spec}train"),), root="gs://elsewhere", validation_fraction=0.0)
    )
    assert corpus.train_documents == 2
    fails(r"has several splits; add ,split= and one of: test, train", f"huggingface:{tmp_path}/data")
    fails(r"split=trian: Unknown split \"trian\"\. Should be one of \[.*'train'.*\]; check the name", f"{spec}trian")


def test_spans_are_ranges_of_rows(tmp_path):
    write_dataset(tmp_path / "texts", [f"document {number} " * 10 for number in range(1000)])
    [file] = find_inputs(str(tmp_path / "texts"))
    cut = spans(pickle.loads(pickle.dumps(file)), file.size // 4)
    assert [(span.start, span.end) for span in cut] == [(0, 250), (250, 500), (500, 750), (750, 1000)]


def test_columns_and_bad_records_are_named(tmp_path):
    datasets.Dataset.from_dict({"body": ["x", None]}).save_to_disk(str(tmp_path / "a"))
    fails(r"there is no column text_key='boddy'; did you mean 'body'\?$", tmp_path / "a", text_key="boddy")
    fails(r"a: row 1: the text is not a string but NoneType; fix it, or skip", tmp_path / "a", text_key="body")
    write_dataset(tmp_path / "b", [as_chat("a question")])
    fails(r"b: row 0: the assistant says nothing in this chat", tmp_path / "b", kind=RecordKind.CHAT)


def test_folders_of_several_splits(tmp_path):
    whole = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(str(tmp_path / "a"))
    fails(r"a: the dataset has several splits; name the folder of one of: test, train", tmp_path / "a")
    assert every_way(tmp_path / "a" / "train") == ["x"]
    (tmp_path / "a" / "test" / "dataset_info.json").unlink()
    fails(r"test: .*; check the name, the options and the connection", tmp_path / "a" / "test")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("huggingface:", "there is no name; write huggingface:dataset,split=train"),
        (
            "huggingface:wikitext,train",
            "'train' is not an option=value of a dataset; known: data_dir, data_files, name",
        ),
        ("huggingface:wikitext,splt=train", r"'splt' is not an option=value of a dataset; did you mean 'split'\?"),
    ],
)
def test_bad_options(path, message):
    fails(message, path)


def test_a_hub_that_is_not_reached(monkeypatch):
    def refuse(path, **options):
        raise ConnectionError(f"Couldn't reach {path!r}\non the Hub with {options}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    path = "huggingface:org/corpus,name=small,split=train"
    fails(r"Couldn't reach 'org/corpus' on the Hub with {'name': 'small', 'split': 'train'}; check the name", path)


def test_without_the_library(tmp_path, monkeypatch):
    write_dataset(tmp_path / "texts", TEXTS)
    huggingface._load.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (tmp_path / "texts", "huggingface:wikitext"):
        fails(r"the library `datasets` is not installed; pip install 'looplm_jax\[datasets\]'", path)


def test_a_hub_url_without_its_library(monkeypatch):
    """The file system `hf://` is part of huggingface_hub."""
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, "hf", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    known = {"class": "huggingface_hub.HfFileSystem", "err": "Install huggingface_hub to access HfFileSystem"}
    monkeypatch.setitem(registry.known_implementations, "hf", known)  # the entry without the library
    path = "hf://datasets/org/name/a.jsonl"
    fails(f"{path}: Install huggingface_hub to access HfFileSystem; install what it names", path)


def test_the_library_is_imported_only_for_a_dataset(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    program = (
        "import sys\nfrom looplm_jax.config import SourceConfig\nfrom looplm_jax.data.sources import open_files\n"
        f"open_files(SourceConfig(path={str(tmp_path / 'a.jsonl')!r}))\n"
        "print([name for name in ('datasets', 'pyarrow', 'google.protobuf', 'jax') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
