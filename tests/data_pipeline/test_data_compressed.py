import contextlib
import errno
import gzip
import os
import tempfile

import pytest
from data_files import WRITERS, json_lines

from looplm_jax.config import OnBadRecord, SourceConfig
from looplm_jax.data.sources import BadRecordPolicy, find_inputs, open_files, scan, spans
from looplm_jax.errors import UserError

DOCUMENTS = [f"document {number} " * 400 for number in range(200)]
COMPRESSED = ("a.jsonl.gz", "a.jsonl.zst")


def stream(path):
    [file] = find_inputs(str(path))
    return list(scan(file, SourceConfig(path=str(path)), BadRecordPolicy(OnBadRecord.STOP)))


def fails(match, path):
    for read in (stream, lambda path: open_files(SourceConfig(path=str(path)))):
        with pytest.raises(UserError, match=match) as error:
            read(path)
        assert "\n" not in str(error.value)


def open_paths():
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{name}")


@pytest.fixture(params=COMPRESSED)
def path(request, tmp_path):
    WRITERS[request.param](tmp_path / request.param, DOCUMENTS)
    return tmp_path / request.param


def test_a_compressed_file_is_one_span(path):
    [file] = find_inputs(str(path))
    assert len(spans(file, 100)) == 1
    assert file.suffix == ".jsonl"
    assert file.size == path.stat().st_size


def test_a_file_that_was_cut_off(path):
    """Truncated anywhere except at the end of a complete frame or member."""
    content = path.read_bytes()
    for length in (5, len(content) // 4, len(content) - 1):
        path.write_bytes(content[:length])
        fails(rf"{path.name}: the compressed data end too early; copy or download the file again", path)


def test_a_damaged_file(path):
    content = bytearray(path.read_bytes())
    content[40:80] = bytes(40)
    path.write_bytes(content)
    fails(rf"{path.name}: (damaged, or not compressed as its name says|the compressed data end)", path)


def test_a_file_that_is_not_compressed(path):
    path.write_bytes(json_lines(DOCUMENTS))
    fails(rf"{path.name}: damaged, or not compressed as its name says \(.*\); copy or download", path)


def test_lines_are_those_of_the_content(path):
    path.write_bytes(gzip.compress(b'{"text": "x"}\nbad\n'))
    if path.suffix == ".gz":
        fails(r"a.jsonl.gz:2: not JSON", path)


def test_nothing_in_it(path):
    WRITERS[path.name](path, [])
    assert stream(path) == []
    path.write_bytes(b"")
    assert stream(path) == []


def test_the_content_goes_to_a_temporary_file_once(path, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    opened = open_files(SourceConfig(path=str(path)))
    path.unlink()
    assert [opened[index] for index in (7, 3, 150)] == [DOCUMENTS[7], DOCUMENTS[3], DOCUMENTS[150]]
    assert list(folder.iterdir()) == []
    assert sum(str(folder) in link for link in open_paths()) == 1
    del opened
    assert not any(str(folder) in link for link in open_paths())


def test_no_room_for_the_content(path, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(UserError, match=r"its content cannot be kept in .* \(No space left on device\); set TMPDIR"):
        open_files(SourceConfig(path=str(path)))
    assert stream(path) == DOCUMENTS


def test_no_folder_for_the_content(path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/does/not/exist"])
    with pytest.raises(UserError, match=r"cannot be kept in a temporary folder \(No usable temporary .*\); set TMPDIR"):
        open_files(SourceConfig(path=str(path)))


def test_text_is_decompressed_too(tmp_path):
    text = "A paragraph.\n\n" * 1000
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert "".join(stream(tmp_path / "a.txt.gz")) == text
    assert len(open_files(SourceConfig(path=str(tmp_path)))) > 5


def test_formats_that_are_compressed_inside(tmp_path):
    for name in ("a.parquet.gz", "a.arrayrecord.zst"):
        (tmp_path / name).write_bytes(b"")
        fails(rf"{name}: such files are compressed inside; decompress it", tmp_path / name)
