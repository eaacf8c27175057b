"""Small prepared corpora for the tests of this folder."""

import json
from pathlib import Path

from looplm_jax.config import SourceConfig
from looplm_jax.corpus import PrepareConfig, open_prepared, prepare
from looplm_jax.corpus._reader import PreparedSequences

LENGTH = 32


class Silent:
    """A progress display that only records what began, and how many units were done."""

    def __init__(self):
        self.begun, self.units = [], 0

    def begin(self, what, *, bytes, done):
        self.begun.append((what, bytes, done))

    def advance(self, progress):
        pass

    def finish_unit(self, bytes):
        self.units += 1


def order(tokenizer, *paths, **changes) -> PrepareConfig:
    """Returns an order with units of about 2 KB, so that small files form several."""
    sources = tuple(SourceConfig(path=str(path)) for path in paths)
    defaults = {"sequence_length": LENGTH, "validation_fraction": 0.1, "unit_bytes": 2000}
    return PrepareConfig(**{"sources": sources, "tokenizer": tokenizer, **defaults, **changes})


def prepared(tokenizer, out, *paths, workers=1, watcher=None, **changes):
    """Prepares a corpus at `out` and returns its manifest."""
    return prepare(order(tokenizer, *paths, **changes), str(out), workers=workers, watcher=watcher or Silent())


def content(folder) -> dict[str, bytes]:
    """Returns the content of all files of a folder."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def segments(rows: PreparedSequences):
    """Returns the segments of all rows."""
    return [segment for index in range(len(rows)) for segment in rows.segments(index)]


def texts_of(tokenizer, folder) -> tuple[list[str], list[str]]:
    """Returns the training and the held-out documents, from rows that are longer than any document."""
    corpus = open_prepared(str(folder))
    parts = (corpus.train, corpus.validation)
    return tuple(sorted(tokenizer.decode(segment.tokens) for segment in segments(part)) for part in parts)


def manifest_json(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())
