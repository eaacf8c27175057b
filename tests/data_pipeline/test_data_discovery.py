"""Which files a path stands for; every file that is left out is reported."""

import gzip
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from looplm_jax.config import OnBadRecord, ReadLimits, RecordKind, SourceConfig
from looplm_jax.data import open_corpus
from looplm_jax.data.sources import BadRecordPolicy, find_inputs, open_files, scan, spans, summarize
from looplm_jax.data.sources._discovery import find_files
from looplm_jax.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}


def write(path, *texts, key="text"):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def documents(path, **fields):
    source = open_files(SourceConfig(path=str(path), **fields))
    return [source[index] for index in range(len(source))]


def summary(path, **fields):
    return summarize([find_inputs(str(path), SourceConfig(path=str(path), **fields))])


def refused(match, path, **fields):
    with pytest.raises(UserError, match=match) as error:
        documents(path, **fields)
    assert "\n" not in str(error.value)


def test_links_to_folders_are_followed_and_their_loops_are_not(tmp_path):
    write(tmp_path / "real" / "a.jsonl", "1", "2")
    write(tmp_path / "tree" / "own.jsonl", "3")
    (tmp_path / "tree" / "link").symlink_to("../real")
    (tmp_path / "tree" / "again").symlink_to("../real")
    (tmp_path / "tree" / "loop").symlink_to(".")
    (tmp_path / "real" / "back").symlink_to("../tree")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "part1").symlink_to("../real")
    assert documents(tmp_path / "tree") == ["1", "2", "3"]
    assert sorted(documents(tmp_path / "only")) == ["1", "2", "3"]
    assert documents(tmp_path / "tree" / "*" / "a.jsonl") == ["1", "2"]
    assert documents(tmp_path / "only" / "part*" / "*.jsonl") == ["1", "2"]
    assert sorted(documents(tmp_path / "tree" / "**" / "*.jsonl")) == ["1", "2", "3"]
    assert sorted(documents(tmp_path / "tree" / "**")) == ["1", "2", "3"]


def test_a_file_that_several_links_lead_to_counts_once(tmp_path):
    write(tmp_path / "z.jsonl", "x")
    (tmp_path / "a.jsonl").symlink_to("z.jsonl")
    assert documents(tmp_path) == ["x"]
    assert summary(tmp_path) == "reading 1 file (1 .jsonl); left out 1 (1 linked twice)"
    assert [file.path for file in find_files(str(tmp_path)).files] == [str(tmp_path / "z.jsonl")]
    assert documents(tmp_path / "*.jsonl") == ["x"]


def test_a_link_whose_name_says_more_than_that_of_its_file(tmp_path):
    """As in the cache of the Hugging Face hub."""
    blob = write(tmp_path / "blobs" / "0123abcd", "x")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "train.jsonl").symlink_to(blob)
    assert [pathlib.Path(file.path).name for file in find_files(str(tmp_path)).files] == ["train.jsonl"]


def test_hidden_files_are_data_only_where_they_are_named(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    for folder in (".ipynb_checkpoints", ".git/x", "_temporary/0", "_delta_log", "__pycache__"):
        write(tmp_path / folder / "b.jsonl", "hidden")
    write(tmp_path / "__init__.py", "code")
    write(tmp_path / ".c.jsonl", "hidden")
    assert summary(tmp_path) == "reading 2 files (1 .jsonl, 1 .py); left out 6 (6 hidden)"
    assert documents(tmp_path / "*.jsonl") == ["a"]
    assert documents(tmp_path / "**" / "*.jsonl") == ["a"]
    assert documents(tmp_path / ".c.jsonl") == ["hidden"]
    assert documents(tmp_path / ".*" / "b.jsonl") == ["hidden"]
    assert documents(tmp_path / ".git") == ["hidden"]


def test_what_this_library_wrote_is_no_data(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "run" / "metrics.jsonl", "no")
    write(tmp_path / "run" / "report.md", "no")
    write(tmp_path / "run" / "config.json", "no")
    write(tmp_path / "prepared" / "looplm_plan.json", "no")
    write(tmp_path / "prepared" / "cleaning.md", "no")
    write(tmp_path / "model" / "config.json", "no")
    write(tmp_path / "model" / "README.md", "no")
    write(tmp_path / "model" / "modeling_looplm.py", "no")
    (tmp_path / "model" / "model.safetensors").touch()
    assert documents(tmp_path) == documents(tmp_path / "**" / "*.jsonl") == ["a"]
    assert summary(tmp_path) == (
        "reading 1 file (1 .jsonl); left out 6 (1 .json, 1 .safetensors, 2 beside model weights, 1 prepared corpus, "
        "1 run folder)"
    )
    refused("run is a run folder, not a folder of documents; name the files in it", tmp_path / "run")
    refused("prepared is a prepared corpus, not a folder of documents", tmp_path / "prepared")


@pytest.mark.parametrize("make", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_refused(tmp_path, make):
    path = tmp_path / "d" / "b.jsonl"
    path.parent.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    if make == "pipe":
        os.mkfifo(path)
    elif make == "socket":
        listener.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    for pattern in (path, path.parent, path.parent / "*.jsonl"):
        refused(r"b.jsonl is a (named pipe|socket|device), not a file", pattern)
    listener.close()

    write(tmp_path / "other" / "a.jsonl", "a")
    os.mkfifo(tmp_path / "other" / "pipe")
    assert summary(tmp_path / "other").endswith("left out 1 (1 broken links and special files)")


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    for pattern in (tmp_path, tmp_path / "a.jsonl", tmp_path / "*.jsonl"):
        refused("a.jsonl is a link to a file that does not exist", pattern)


@pytest.mark.parametrize("name", ["x.jsonl?download=true", "x.jsonl.bak", "part-00000", "x", "y.log"])
def test_json_lines_are_known_by_their_content(tmp_path, name):
    write(tmp_path / name, "one", "two")
    assert documents(tmp_path / name) == ["one", "two"]
    write(tmp_path / "z.bak", "one", key="body")
    refused("z.bak:1: the record has no field 'text'; known: body", tmp_path / "z.bak")
    assert documents(tmp_path / "z.bak", text_key="body") == ["one"]


def test_a_folder_reads_json_lines_of_any_name_and_counts_the_rest(tmp_path):
    write(tmp_path / "part-00000", "one")
    write(tmp_path / "part-00001", "two")
    write(tmp_path / "other", "no", key="body")
    write(tmp_path / "part-00000.bak", "one")
    for name in ("a.csv", "b.csv", "c.jsonl.xz", "d.tar.gz", "config.json"):
        (tmp_path / name).write_bytes(b"\x00\x01")
    assert documents(tmp_path) == ["one", "two"]
    assert summary(tmp_path) == (
        "reading 2 files (2 .jsonl by content); left out 7 (1 .bak, 2 .csv, 1 .gz, 1 .json, 1 .xz, 1 without an ending)"
    )
    assert len(spans(next(iter(find_inputs(str(tmp_path)))), 1)) > 1


def test_many_kinds_are_one_short_line(tmp_path):
    write(tmp_path / "a.jsonl", "x")
    for number in range(300):
        (tmp_path / f"log.{number:03d}").touch()
    for name in ("a.csv", "b.csv", "c.x\x1b[31m\ny"):
        (tmp_path / name).touch()
    line = summary(tmp_path)
    assert line.startswith("reading 1 file (1 .jsonl); left out 303 (")
    assert line.endswith("2 .csv, 294 of other kinds)")
    assert line.isprintable()
    (tmp_path / "a.jsonl").unlink()
    refused(r"no file matches .*; left out 303 \(.*2 .csv, 294 of other kinds\); check", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nx\n", r"a.csv: .csv is not read; convert it to .jsonl or .parquet"),
        ("a.bin", b"\x00\x01", "a.bin is neither text nor of a known kind"),
        ("a", b"PAR1....", "a: its content is that of a .parquet file; give it that ending"),
        ("b", gzip.compress(b"x", mtime=0), "b: its content is that of a .gz file"),
        ("a.txt", "text".encode("utf-16"), "a.txt is UTF-16; convert it to UTF-8"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "a.jsonl is UTF-16; convert it to UTF-8"),
    ],
)
def test_what_is_named_and_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(message, tmp_path / name)


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "code.py", "notes", "notes.txt.gz"])
def test_text_holds_no_chats(tmp_path, name):
    content = b"A text."
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    refused(rf"{name} is text and holds no chats; leave out --chat, or give", tmp_path / name, kind=RecordKind.CHAT)
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT))
    assert len(documents(tmp_path, kind=RecordKind.CHAT)) == 1
    assert summary(tmp_path, kind=RecordKind.CHAT).startswith("reading 1 file (1 .jsonl); left out 1 (1 ")


def test_the_card_of_a_dataset_is_no_document(tmp_path):
    write(tmp_path / "data" / "train.jsonl", "x")
    (tmp_path / "README.md").write_text("A card.")
    assert documents(tmp_path) == ["x"]
    assert summary(tmp_path) == "reading 1 file (1 .jsonl); left out 1 (1 README beside records)"
    (tmp_path / "data" / "train.jsonl").rename(tmp_path / "data" / "train.txt")
    assert summary(tmp_path) == "reading 2 files (1 .md, 1 .txt)"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rst", "a.txt.gz", "a"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    content = b"\xef\xbb\xbfhello"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert documents(tmp_path / name) == ["hello"]
    (tmp_path / name).write_bytes(gzip.compress(content[:3]) if name.endswith(".gz") else content[:3])
    refused("hold no text", tmp_path / name)


def test_a_path_that_exists_is_no_glob(tmp_path):
    write(tmp_path / "a[1]" / "x?.jsonl", "literal")
    write(tmp_path / "a1" / "xy.jsonl", "other")
    assert documents(tmp_path / "a[1]") == documents(tmp_path / "a[1]" / "x?.jsonl") == ["literal"]
    assert documents(tmp_path / "a[1]" / "*.jsonl") == ["literal"]
    assert documents(tmp_path / "a?" / "x?.jsonl") == ["other"]


def test_folders_and_endings_in_capitals(tmp_path):
    write(tmp_path / "x.jsonl" / "A.JSONL", "x")
    assert documents(tmp_path / "x.jsonl") == documents(tmp_path) == ["x"]


def test_more_compressed_files_than_descriptors(tmp_path):
    for number in range(60):
        (tmp_path / f"{number:02d}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "%d"}\n' % number))
    before = len(os.listdir("/proc/self/fd"))
    source = open_files(SourceConfig(path=str(tmp_path)))
    assert [source[index] for index in range(60)] == [str(number) for number in range(60)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_training_says_what_it_reads(tmp_path, text_data):
    lines = []
    open_corpus(text_data, say=lines.append)
    assert lines == ["reading 2 files (2 .jsonl)"]


# Limits on files


def rle_frame(count, window=0x38):
    """Returns a Zstandard frame of `count` blocks that decompress to 128 KiB from 4 bytes each."""
    last = [number == count - 1 for number in range(count)]
    blocks = b"".join(((131072 << 3) | 2 | end).to_bytes(3, "little") + b"a" for end in last)
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window]) + blocks


def read(path, on_bad_record=OnBadRecord.SKIP, **limits):
    policy = BadRecordPolicy(on_bad_record)
    [file] = find_inputs(str(path), limits=ReadLimits(**limits))
    return list(scan(file, SourceConfig(path=str(path)), policy)), policy.first


MEMORY = """
import resource, sys
from looplm_jax.config import OnBadRecord, SourceConfig
from looplm_jax.data.sources import BadRecordPolicy, find_inputs, scan
def read(path):
    for file in find_inputs(path):
        list(scan(file, SourceConfig(path=path), BadRecordPolicy(OnBadRecord.STOP)))
try:
    read("warm.jsonl")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read(sys.argv[1])
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


@pytest.mark.parametrize("kind", ["zstd", "gzip", "plain"])
def test_a_gigabyte_in_one_line_takes_little_memory(tmp_path, kind):
    write(tmp_path / "warm.jsonl", "x")
    if kind == "zstd":
        (tmp_path / "b.jsonl.zst").write_bytes(rle_frame(8192))
    elif kind == "gzip":
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"a" * 2**24) * 64)
    else:
        with (tmp_path / "b.jsonl").open("wb") as stream:
            stream.truncate(2**30)
    [name] = [path.name for path in tmp_path.glob("b.*")]
    out = subprocess.run([sys.executable, "-c", MEMORY, name], cwd=tmp_path, capture_output=True, text=True, check=True)
    message, megabytes = out.stdout.splitlines()
    assert "longer than 67,108,864 bytes, which data.limits.record_bytes allows" in message
    assert int(megabytes) < 300


def test_a_line_that_is_too_long_is_a_bad_record_of_its_own(tmp_path):
    path = write(tmp_path / "a.jsonl", "short", "x" * 3000, "end")
    found, first = read(path, record_bytes=1000)
    assert found == ["short", "end"]
    assert first.endswith("a.jsonl:2: longer than 1,000 bytes, which data.limits.record_bytes allows")
    policy = BadRecordPolicy(OnBadRecord.SKIP)
    [file] = find_inputs(str(path), limits=ReadLimits(record_bytes=1000))
    parts = [document for span in spans(file, 100) for document in scan(file, SourceConfig(path="-"), policy, span)]
    assert parts == ["short", "end"]
    assert policy.skipped == 1
    (tmp_path / "a.py").write_text("x" * 1001)
    assert read(tmp_path / "a.py", record_bytes=1000)[0] == []
    assert read(tmp_path / "a.py", record_bytes=1001)[0] == ["x" * 1001]


def test_content_far_larger_than_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("looplm_jax.data.sources._compression._ALWAYS_ALLOWED", 2**20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a line\n" * 2**20))
    (tmp_path / "a.txt.zst").write_bytes(rle_frame(64))
    for name in ("a.txt.gz", "a.txt.zst"):
        with pytest.raises(
            UserError, match=rf"{name}: holds more than 256 times its compressed bytes; if that is right"
        ):
            read(tmp_path / name)
    assert len("".join(read(tmp_path / "a.txt.gz", compression_ratio=2000)[0])) == 7 * 2**20


def test_a_window_that_is_too_large(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(rle_frame(1, window=0x78))
    with pytest.raises(UserError, match=r"needs a Zstandard window of more than 1,048,576 bytes; raise data.limits"):
        read(tmp_path / "a.jsonl.zst", window_bytes=2**20)


def test_limits_are_positive():
    with pytest.raises(UserError, match=r"data.limits.record_bytes must be at least 1, not 0"):
        ReadLimits(record_bytes=0)
