"""Helpers that write documents to files of every format and read them back in every way."""

import gzip
import json
import pickle

import pyarrow
import pyarrow.parquet

from looplm_jax.config import OnBadRecord, SourceConfig
from looplm_jax.data import Message, sources
from looplm_jax.data._documents import document_key


def as_record(document):
    """Returns a document as a record of named fields, as most formats store it."""
    if isinstance(document, str):
        return {"text": document}
    return {"messages": [{"role": message.role, "content": message.content} for message in document]}


def as_chat(*turns):
    """Returns alternating turns of a user and an assistant."""
    return tuple(Message("assistant" if number % 2 else "user", turn) for number, turn in enumerate(turns))


def json_lines(documents):
    return "".join(json.dumps(as_record(document), ensure_ascii=False) + "\n" for document in documents).encode()


def write_plain(path, documents):
    path.write_bytes(json_lines(documents))


def write_gzip(path, documents):
    """Writes two members, as `cat a.gz b.gz` does."""
    half = len(documents) // 2
    path.write_bytes(gzip.compress(json_lines(documents[:half])) + gzip.compress(json_lines(documents[half:])))


def write_zstd(path, documents):
    """Writes two frames with a skippable frame between them."""
    import zstandard

    half = len(documents) // 2
    frames = [zstandard.compress(json_lines(part)) for part in (documents[:half], documents[half:])]
    path.write_bytes(frames[0] + b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + frames[1])


def write_parquet(path, documents, rows=3):
    column = "text" if not documents or isinstance(documents[0], str) else "messages"
    table = pyarrow.table({column: [as_record(document)[column] for document in documents]})
    if not documents:
        table = pyarrow.table({column: pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def write_array_record(path, documents):
    write_records(path, [json.dumps(as_record(document)).encode() for document in documents])


def write_records(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_dataset(path, documents):
    import datasets

    datasets.disable_progress_bars()
    column = "text" if not documents or isinstance(documents[0], str) else "messages"
    features = datasets.Features({"text": datasets.Value("string")}) if column == "text" else None
    rows = {column: [as_record(document)[column] for document in documents]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))


WRITERS = {
    "a.jsonl": write_plain,
    "a.ndjson": write_plain,
    "a.json": write_plain,
    "a.jsonl.gz": write_gzip,
    "a.json.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "a.JSON.ZST": write_zstd,
    "a.parquet": write_parquet,
    "a.arrayrecord": write_array_record,
    "a.array_record-00000-of-00001": write_array_record,
}


def read_all(source):
    return [source[index] for index in range(len(source))]


def every_way(path, unit_bytes=(1, 40, 2**26), **fields):
    """Reads the documents of a path in one pass, by spans of several sizes, and by index; checks that all agree."""
    source, bad = SourceConfig(path=str(path), **fields), sources.BadRecordPolicy(OnBadRecord.STOP)
    files = sources.find_inputs(source.path)
    found = [document for file in files for document in sources.scan(file, source, bad)]
    for size in unit_bytes:
        cut = [pickle.loads(pickle.dumps((file, span))) for file in files for span in sources.spans(file, size)]
        assert [document for file, span in cut for document in sources.scan(file, source, bad, span)] == found
    if found:
        index = sources.open_files(source)
        assert read_all(index) == found
        assert index.keys.tolist() == [document_key(document) for document in found]
    return found
