"""Documents in files and datasets, local or at any fsspec URL, streamed or by index.

A source is a path, folder, glob, URL or Hugging Face dataset. JSON Lines, Parquet, ArrayRecord and plain text are read,
some of them compressed. `open_files` scans every file once and returns its documents by index, without keeping text in
memory:

    >>> import pathlib, tempfile
    >>> from looplm_jax.config import SourceConfig
    >>> from looplm_jax.data.sources import open_files
    >>> path = pathlib.Path(tempfile.mkdtemp(), "texts.jsonl")
    >>> _ = path.write_text('{"text": "one"}\\n{"text": "two"}\\n')
    >>> documents = open_files(SourceConfig(path=str(path)))
    >>> len(documents), documents[1]
    (2, 'two')

Finding files:
  `find_inputs` resolves a path to `Inputs`, each an `Input`, such as a `DataFile`; `summarize` describes them in one
  line.

Reading documents, each a `Document`, which is a text or a chat:
  `open_files` and `FileSource` read by index. `scan` streams the documents of a file, or of one
  `Span` of those that `spans` returns.
  `BadRecordPolicy` decides what happens to records that are not valid documents.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # Finding files.
    from looplm_jax.data.sources._source import Input, Inputs, find_inputs, summarize
    from looplm_jax.data.sources._files import DataFile

    # Reading documents.
    from looplm_jax.data._documents import Document
    from looplm_jax.data.sources._source import FileSource, open_files, scan, spans
    from looplm_jax.data.sources._formats import BadRecordPolicy, Span

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
