import json
import struct

import fsspec
import pytest
from data_files import WRITERS, as_chat, as_record, write_records
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import OnBadRecord, RecordKind, SourceConfig
from looplm_jax.data.sources import BadRecordPolicy, find_inputs, open_files, scan, spans
from looplm_jax.data.sources import _array_record as array_record
from looplm_jax.data.sources._array_record import parse_example
from looplm_jax.errors import UserError


def length_delimited(field, content):
    """Returns a bytes field of a protocol buffer."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def varint(number):
    low, rest = number & 0x7F, number >> 7
    return bytes([low]) if not rest else bytes([low | 0x80]) + varint(rest)


def example(features):
    """Returns a `tf.train.Example`, byte for byte as TensorFlow writes it."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, float):
            feature = length_delimited(2, length_delimited(1, struct.pack("<f", values)))
        else:
            feature = length_delimited(1, b"".join(length_delimited(1, value) for value in values))
        entries += length_delimited(1, length_delimited(1, name.encode()) + length_delimited(2, feature))
    return length_delimited(1, entries)


def read_all(path, on_bad_record=OnBadRecord.STOP, **fields):
    source = SourceConfig(path=str(path), **fields)
    [file] = find_inputs(source.path)
    found = list(scan(file, source, BadRecordPolicy(on_bad_record)))
    if found:
        index = open_files(source, on_bad_record=on_bad_record)
        assert [index[number] for number in range(len(index))] == found
    return found


def fails(match, path, **fields):
    with pytest.raises(UserError, match=match) as error:
        open_files(SourceConfig(path=str(path), **fields))
    assert "\n" not in str(error.value)


@given(st.dictionaries(st.text(min_size=1), st.binary() | st.floats(width=32)))
def test_examples_are_read_as_tensorflow_writes_them(features):
    content = example({name: value if isinstance(value, float) else [value] for name, value in features.items()})
    expected = {name: None if isinstance(value, float) else value for name, value in features.items()}
    assert parse_example(content) == (expected or None)


@pytest.mark.parametrize("content", [b"", b"text", b'{"text": "x"}', b"\n\x05", b"\n\x00", b"\xff" * 9])
def test_what_is_no_example(content):
    assert parse_example(content) is None


def test_records_of_three_kinds(tmp_path):
    texts = ["first\n", "zwei — два", "three"]
    write_records(tmp_path / "a.arrayrecord", [text.encode() for text in texts])
    write_records(tmp_path / "b.array_record", [json.dumps({"text": text}).encode() for text in texts])
    write_records(tmp_path / "c.arrayrecord", [example({"text": [text.encode()], "score": 0.5}) for text in texts])
    for name in ("a.arrayrecord", "b.array_record", "c.arrayrecord"):
        assert read_all(tmp_path / name) == texts


def test_chats(tmp_path):
    chats = [as_chat("loop?", "state"), as_chat("why", "because")]
    WRITERS["a.arrayrecord"](tmp_path / "a.arrayrecord", chats)
    messages = [json.dumps(as_record(chat)["messages"]).encode() for chat in chats]
    write_records(tmp_path / "b.arrayrecord", [example({"messages": [value]}) for value in messages])
    for name in ("a.arrayrecord", "b.arrayrecord"):
        assert read_all(tmp_path / name, kind=RecordKind.CHAT) == chats
    write_records(tmp_path / "c.arrayrecord", [b"some text"])
    fails("c.arrayrecord: record 0: not JSON", tmp_path / "c.arrayrecord", kind=RecordKind.CHAT)


BAD_RECORDS = [
    ([b"text", b"\xff"], "a.arrayrecord: record 1: not UTF-8 at byte 0 of the record; fix it, or skip"),
    ([b'{"text": "x"}', b"text"], "a.arrayrecord: record 1: not JSON"),
    ([b'{"text": "x"}', b'{"txt": "x"}'], r"a.arrayrecord: record 1: the record has no field 'text'; did you mean 't"),
    ([example({"text": [b"x"]}), b"text"], "a.arrayrecord: record 1: not a tf.train.Example, as the first record is"),
    ([example({"text": [b"x"]}), example({"body": [b"x"]})], "record 1: the record has no field 'text'; known: body"),
    ([example({"text": [b"x"]}), example({"text": [b"x", b"y"]})], "record 1: the text is not a string but NoneType"),
    ([example({"text": [b"x"]}), example({"text": [b"\xff"]})], "record 1: not UTF-8 at byte 0 of the feature 'text'"),
]


@pytest.mark.parametrize(("records", "message"), BAD_RECORDS)
def test_bad_records_stop_or_are_skipped(tmp_path, records, message):
    path = tmp_path / "a.arrayrecord"
    write_records(path, [*records, records[0]])
    fails(message, path)
    assert len(read_all(path, OnBadRecord.SKIP)) == 2


def test_files_that_are_none(tmp_path):
    path = tmp_path / "a.arrayrecord"
    write_records(path, [b"text " * 1000] * 100)
    for content in (b"", b"nonsense" * 100_000, path.read_bytes()[:70_000]):
        path.write_bytes(content)
        fails(r"a.arrayrecord: cannot be read as ArrayRecord \(.*\); copy or make the file again", path)
    write_records(path, [])
    fails("hold no text", path)


def test_a_damaged_record(tmp_path):
    path = tmp_path / "a.arrayrecord"
    write_records(path, [bytes(range(97, 123)) * 4000] * 9)
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)
    fails(r"a.arrayrecord: cannot be read as ArrayRecord \(Corrupted", path)


def test_spans_are_ranges_of_records(tmp_path):
    path = tmp_path / "a.arrayrecord"
    write_records(path, [b"text %d " % number * 10 for number in range(1000)])
    [file] = find_inputs(str(path))
    cut = spans(file, file.size // 4)
    assert [(span.start, span.end) for span in cut] == [(0, 250), (250, 500), (500, 750), (750, 1000)]


def test_files_elsewhere_are_copied(tmp_path):
    write_records(tmp_path / "a.arrayrecord", [b"one", b"two"])
    fs = fsspec.filesystem("memory")
    fs.pipe("/records/a.arrayrecord", (tmp_path / "a.arrayrecord").read_bytes())
    assert read_all("memory://records/a.arrayrecord") == ["one", "two"]
    fs.rm("/records", recursive=True)


def test_open_files_are_bounded(tmp_path):
    for number in range(array_record._OPEN_FILES + 20):
        write_records(tmp_path / f"{number}.arrayrecord", [b"text %d" % number])
    opened = open_files(SourceConfig(path=str(tmp_path)))
    assert len({opened[number] for number in range(len(opened))}) == len(opened)
    assert array_record._opened.cache_info().currsize <= array_record._OPEN_FILES
