"""Documents in files, by index: text, .jsonl and .parquet, local or at any fsspec URL."""

from looplm_jax.data.sources.source import FileSource, open_files

__all__ = ["FileSource", "open_files"]
