"""Invalid UTF-8 in Parquet and datasets is a bad record, named by file and row; row groups that are too large."""

import errno
import itertools
import os

import pyarrow
import pyarrow.parquet
import pytest

from looplm_jax.config import OnBadRecord, ReadLimits, RecordKind, SourceConfig
from looplm_jax.data.sources import BadRecordPolicy, find_inputs, open_files, scan
from looplm_jax.errors import UserError


def _unchecked(values):
    binary = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(binary), binary.buffers())


def texts(values):
    return pyarrow.table({"text": _unchecked(values)})


def chats(contents):
    roles = pyarrow.array(["user", "assistant"] * len(contents))
    said = _unchecked([part for content in contents for part in (b"Who?", content)])
    messages = pyarrow.StructArray.from_arrays([roles, said], ["role", "content"])
    return pyarrow.table({"messages": pyarrow.ListArray.from_arrays(range(0, 2 * len(contents) + 1, 2), messages)})


CASES = [(texts, RecordKind.TEXT), (chats, RecordKind.CHAT)]


@pytest.mark.parametrize(("make", "kind"), CASES)
def test_parquet(tmp_path, make, kind):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(make([b"good", b"fine", b"ab\xff", b"last"]), path, row_group_size=2)
    source = SourceConfig(path=str(path), kind=kind)
    with pytest.raises(UserError, match=r"a.parquet: row 2: not UTF-8 at byte 2 of the text") as error:
        open_files(source)
    assert "\n" not in str(error.value)
    found = open_files(source, on_bad_record=OnBadRecord.SKIP)
    assert (len(found), found.skipped) == (3, 1)
    assert found[2]


@pytest.mark.parametrize(("make", "kind"), CASES)
def test_datasets(tmp_path, make, kind):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset(make([b"good", b"ab\xff", b"last"])).save_to_disk(str(tmp_path / "d"))
    source = SourceConfig(path=str(tmp_path / "d"), kind=kind)
    with pytest.raises(UserError, match=r"d: row 1: not UTF-8 at byte 2 of the text"):
        open_files(source)
    found = open_files(source, on_bad_record=OnBadRecord.SKIP)
    assert (len(found), found.skipped) == (2, 1)


def test_a_row_group_that_is_too_large(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(texts([b"x" * 5000, b"y" * 5000]), path)
    [file] = find_inputs(str(path), limits=ReadLimits(row_group_bytes=4000))
    with pytest.raises(UserError, match=r"column 'text' of row group 0 takes [\d,]+ bytes, and data.limits.row_group"):
        list(scan(file, SourceConfig(path=str(path)), BadRecordPolicy(OnBadRecord.STOP)))


def test_a_disk_that_refuses_is_not_a_damaged_file(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(texts([b"x"]), path)

    def refuse(*args, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    with pytest.raises(UserError, match=r"a.parquet: cannot be read \(Input/output error\)"):
        open_files(SourceConfig(path=str(path)))


def test_a_text_that_is_repeated_is_in_memory_once(tmp_path):
    """The dictionary has a megabyte, the text 2 GB."""
    before = pyarrow.total_allocated_bytes()
    once = pyarrow.array(["x" * 10**6])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), once)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", store_schema=False)
    source = SourceConfig(path=str(tmp_path / "a.parquet"))
    [file] = find_inputs(source.path)
    most = 0
    for document in itertools.islice(scan(file, source, BadRecordPolicy(OnBadRecord.STOP)), 20):
        assert len(document) == 10**6
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 10**8
