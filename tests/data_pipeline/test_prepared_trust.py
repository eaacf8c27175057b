"""A prepared corpus that does not match its manifest and its source files is refused."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest
from data_helpers import make_texts, write_jsonl
from prepared_helpers import content, prepared

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.corpus import _reader as verification
from looplm_jax.corpus import open_prepared
from looplm_jax.corpus._reader import check_at_start
from looplm_jax.corpus._shards import decode_segments, encode_sequence, token_type
from looplm_jax.data import open_corpus
from looplm_jax.errors import UserError


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust")
    prepared(tokenizer, folder / "out", write_jsonl(folder / "a.jsonl", make_texts(120)))
    return folder / "out"


def rewrite(path, change):
    """Writes the shard again, with other rows."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    reader = ArrayRecordReader(str(path))
    rows = reader.read(0, reader.num_records())
    path.unlink()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in change(rows):
        writer.write(row)
    writer.close()


def train_on(folder):
    return open_corpus(DataConfig(sources=(SourceConfig(path=str(folder)),), validation_fraction=0.1))


def test_a_shard_of_another_preparation_is_refused_at_start(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    train_on(out)
    rewrite(out / "train-00001.arrayrecord", lambda rows: rows[::-1])
    with pytest.raises(UserError, match=r"train-00001.arrayrecord is damaged or missing \(.*\); copy it again"):
        train_on(out)
    (out / "train-00001.arrayrecord").unlink()
    with pytest.raises(UserError, match=r"train-00001.arrayrecord is damaged or missing \(.*no such file"):
        train_on(out)


@pytest.mark.parametrize("known", [True, False])
def test_a_large_corpus_is_checked_by_the_edges_of_its_shards(whole, tmp_path, monkeypatch, known):
    """Output of earlier versions has no digests of edges: lengths are checked, and shards that are read completely."""
    out = shutil.copytree(whole, tmp_path / "copy")
    corpus = open_prepared(str(out))
    read = []
    monkeypatch.setattr(verification, "_BYTES_AT_START", corpus.manifest.shards[0].bytes)
    monkeypatch.setattr(verification, "check_shard", lambda folder, shard: read.append(shard.name))
    if not known:
        shards = tuple(dataclasses.replace(shard, edges="") for shard in corpus.manifest.train)
        corpus = dataclasses.replace(corpus, manifest=dataclasses.replace(corpus.manifest, train=shards))
    check_at_start([corpus])
    assert 1 <= len(read) < len(corpus.manifest.shards)

    path = out / "train-00001.arrayrecord"
    changed = bytearray(path.read_bytes())
    changed[100] ^= 1
    path.write_bytes(changed)
    if known:
        with pytest.raises(
            UserError, match=r"train-00001.arrayrecord is damaged or missing \(its bytes have changed\)"
        ):
            check_at_start([corpus])
    else:
        check_at_start([corpus])
    path.write_bytes(changed[:-1])
    with pytest.raises(UserError, match=r"train-00001.arrayrecord is damaged or missing \(it has [\d,]+ bytes, not"):
        check_at_start([corpus])


def test_ids_beyond_the_vocabulary_are_not_trained_on(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    corpus = open_prepared(str(out))
    tokens = token_type(corpus.manifest.plan.vocab_size)

    def larger(rows):
        for row in rows:
            segments = decode_segments(row, tokens)
            segments[-1].tokens[-1] = 300
            yield encode_sequence(segments, tokens)

    rewrite(out / corpus.manifest.train[0].name, larger)
    with pytest.raises(
        UserError, match=r"train-00000.arrayrecord is damaged .*sequence 0: id 300 is not in a vocabulary of"
    ):
        open_prepared(str(out)).train[0]


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname", "a/b/c", "..", "", "a\\b", "a\0b"])
@pytest.mark.parametrize("field", ["tokenizer_file", "train"])
def test_a_manifest_names_files_of_its_own_folder(whole, tmp_path, name, field):
    values = json.loads((whole / "manifest.json").read_text())
    if field == "train":
        values["train"][0]["name"] = name
    else:
        values[field] = name
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"names the file '.*', which is not in that folder; copy the folder") as error:
        open_prepared(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_file_that_was_edited_to_the_same_length_is_noticed(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    prepared(tokenizer, tmp_path / "out", path)
    before, times = content(tmp_path / "out"), os.stat(path)
    path = pathlib.Path(path)
    data = path.read_bytes()
    path.write_bytes(data[:-10] + b"x" + data[-9:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        UserError, match=r"out was prepared from files that have changed since, although their sizes have not; choose"
    ):
        prepared(tokenizer, tmp_path / "out", path)
    path.write_bytes(data)
    prepared(tokenizer, tmp_path / "out", path)  # later, with the same content
    assert content(tmp_path / "out") == before


def test_a_plan_without_a_digest_of_contents_is_continued(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    prepared(tokenizer, tmp_path / "out", path)
    for name in ("looplm_plan.json", "manifest.json"):
        values = json.loads((tmp_path / "out" / name).read_text())
        del values.get("plan", values)["contents"]
        (tmp_path / "out" / name).write_text(json.dumps(values))
    before = content(tmp_path / "out")
    assert prepared(tokenizer, tmp_path / "out", path).plan.contents == ""
    assert content(tmp_path / "out") == before
