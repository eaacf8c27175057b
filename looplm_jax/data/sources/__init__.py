"""Documents in files and datasets, local or at any fsspec URL, streamed or by index."""

from looplm_jax.data.documents import Document
from looplm_jax.data.sources.bad_records import BadRecordPolicy
from looplm_jax.data.sources.by_name import Input, Inputs, find_inputs, summarize
from looplm_jax.data.sources.files import DataFile
from looplm_jax.data.sources.formats import Span
from looplm_jax.data.sources.source import FileSource, open_files, scan, spans

__all__ = [
    "BadRecordPolicy",
    "DataFile",
    "Document",
    "FileSource",
    "Input",
    "Inputs",
    "Span",
    "find_inputs",
    "open_files",
    "scan",
    "spans",
    "summarize",
]
