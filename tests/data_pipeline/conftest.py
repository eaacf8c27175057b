import pytest
from data_helpers import make_texts, write_jsonl
from gcs_emulator import bucket, gcs

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.data.tokenizers import train_sentencepiece

__all__ = ["bucket", "gcs"]


@pytest.fixture
def full_windows(monkeypatch):
    """Restores the shuffle windows that users have."""
    monkeypatch.setattr("looplm_jax.data._packing._SHUFFLED_PIECES", 4096)


@pytest.fixture(scope="session")
def tokenizer():
    return train_sentencepiece(make_texts(200), 300)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> DataConfig:
    """Returns the data config of two files, one with twice the weight of the other, and a tenth held out."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(120)
    write_jsonl(folder / "a.jsonl", texts[:80])
    write_jsonl(folder / "b.jsonl", texts[80:])
    sources = (
        SourceConfig(path=str(folder / "a.jsonl"), weight=2.0),
        SourceConfig(path=str(folder / "b.jsonl")),
    )
    return DataConfig(sources=sources, validation_fraction=0.1)
