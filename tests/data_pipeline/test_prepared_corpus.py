"""The output of `prepare`: all documents once, the same bytes in every execution, and a report of omissions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from data_helpers import make_texts, write_jsonl
from prepared_helpers import Silent, content, order, prepared, segments, texts_of
from processes import running

from looplm_jax.config import OnBadRecord, RecordKind, SourceConfig
from looplm_jax.corpus import open_prepared, prepare, verify
from looplm_jax.corpus._format import PreparedFolder, read_manifest
from looplm_jax.corpus._shards import pieces
from looplm_jax.corpus._work_units import divide, make_spec
from looplm_jax.data import Message
from looplm_jax.data._documents import is_validation
from looplm_jax.data._examples import to_example
from looplm_jax.data.sources import DataFile
from looplm_jax.data.tokenizers import SymbolTokenizer
from looplm_jax.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes two files, which form several units."""
    folder = tmp_path_factory.mktemp("files")
    texts = make_texts(120)
    return write_jsonl(folder / "a.jsonl", texts[:80]), write_jsonl(folder / "b.jsonl", texts[80:])


@pytest.fixture(scope="module")
def whole(files, tokenizer, tmp_path_factory):
    """Prepares a corpus of both, without interruption, by one worker."""
    out = tmp_path_factory.mktemp("whole") / "prepared"
    prepared(tokenizer, out, *files)
    return out


def test_the_manifest_counts_what_is_there(whole, tokenizer):
    corpus = open_prepared(str(whole))
    manifest, rows = corpus.manifest, segments(corpus.train)
    assert manifest.plan.units > 5
    assert (manifest.plan.tokenizer, manifest.plan.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    assert manifest.rows == len(corpus.train) == sum(shard.rows for shard in manifest.train)
    assert manifest.tokens == sum(segment.positions for segment in rows)
    assert [source.documents for source in manifest.sources] == [80, 40]
    assert sum(shard.documents for shard in manifest.shards) == 120
    assert all((whole / shard.name).stat().st_size == shard.bytes for shard in manifest.shards)
    assert verify(corpus) == []
    assert sorted(path.name for path in whole.iterdir() if path.suffix != ".arrayrecord") == [
        "looplm_plan.json", "manifest.json", "tokenizer.model", "units",
    ]  # fmt: skip


def test_every_token_of_every_document_is_there_once(whole, tokenizer):
    def wanted(held_out):
        documents = [text for text in make_texts(120) if is_validation(text, 0.1) is held_out]
        return [piece for text in documents for piece in pieces(to_example(text, tokenizer), 32)]

    corpus = open_prepared(str(whole))
    for part, held_out in ((corpus.train, False), (corpus.validation, True)):
        found = [(segment.tokens.tolist(), segment.loss_mask.tolist()) for segment in segments(part)]
        assert sorted(found) == sorted((piece.tokens.tolist(), piece.loss_mask.tolist()) for piece in wanted(held_out))


def test_the_bytes_do_not_depend_on_the_number_of_workers(whole, files, tokenizer, tmp_path):
    prepared(tokenizer, tmp_path / "two", *files, workers=2)
    assert content(tmp_path / "two") == content(whole)


def test_the_same_command_again_does_nothing(whole, files, tokenizer):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    watcher = Silent()
    assert prepared(tokenizer, whole, *files, watcher=watcher) == read_manifest(open_prepared(str(whole)).folder)
    assert watcher.begun == []
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_only_what_is_missing_is_done_again(whole, files, tokenizer, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    (out / "manifest.json").unlink()
    (out / "units" / "00002.json").unlink()
    (out / "train-00004.arrayrecord").unlink()
    watcher = Silent()
    prepared(tokenizer, out, *files, watcher=watcher)
    assert watcher.units == 2
    assert content(out) == content(whole)
    (out / "train-00003.arrayrecord").unlink()  # as the message about a damaged shard advises
    prepared(tokenizer, out, *files)
    assert content(out) == content(whole)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
if __name__ == "__main__":
    from prepared_helpers import prepared
    from looplm_jax.data.tokenizers import load_tokenizer
    prepared(load_tokenizer({tokenizer!r}), {out!r}, *{files!r}, workers=2)
"""


def test_a_killed_command_goes_on(whole, files, tokenizer, tmp_path):
    out, script = tmp_path / "killed", tmp_path / "script.py"
    (tmp_path / "t.model").write_bytes(tokenizer.serialize())
    names = [str(path) for path in files]
    helpers = os.path.dirname(__file__)
    script.write_text(SCRIPT.format(tests=helpers, tokenizer=str(tmp_path / "t.model"), out=str(out), files=names))
    with running([sys.executable, script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not list(out.glob("units/*.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "manifest.json").exists()
    prepared(tokenizer, out, *files)
    assert content(out) == content(whole)


def test_units_are_a_pure_function_of_the_files(files, tokenizer):
    one = order(tokenizer, *files)
    units = divide(one.sources, one.unit_bytes)
    assert units == divide(one.sources, one.unit_bytes)
    assert make_spec(one, units) == make_spec(one, units)
    assert sum(unit.bytes for unit in units) == sum(path.stat().st_size for path in files)
    [together] = divide(one.sources, 10**6)
    assert len(together.file_spans) == 2


OTHERS = {
    "sequence_length: 32, 64": {"sequence_length": 64},
    "validation_fraction: 0.1, 0.2": {"validation_fraction": 0.2},
    "near_duplicates: 0.0, 0.8": {"near_duplicates": 0.8},
    "sources.0.text_key: 'text', 'body'": {"sources": (SourceConfig(path="b.jsonl", text_key="body"),)},
}


@pytest.mark.parametrize(("difference", "changes"), OTHERS.items())
def test_another_command_on_the_same_folder_is_refused(difference, changes, whole, files, tokenizer, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    monkeypatch.setattr(DataFile, "digest", lambda file: pytest.fail(f"read all of {file.name} before it refused"))
    before = content(whole)
    with pytest.raises(UserError, match=r"is prepared by another command \(") as refusal:
        prepared(tokenizer, whole, *files, **changes)
    assert difference in str(refusal.value)
    assert "give the same, or choose another --out" in str(refusal.value)
    assert content(whole) == before


def test_files_that_have_changed_are_refused(files, tokenizer, whole, tmp_path):
    folder = tmp_path / "files"
    shutil.copytree(files[0].parent, folder)
    paths = [folder / path.name for path in files]
    out = tmp_path / "out"
    prepared(tokenizer, out, *paths)
    write_jsonl(paths[1], ["short"])
    with pytest.raises(UserError, match=r"input: '2 files, [0-9]+ bytes, digest [0-9a-f]+', '2 files, "):
        prepared(tokenizer, out, *paths)


def test_a_folder_of_something_else_is_refused(files, tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no prepared corpus; choose another --out"):
        prepared(tokenizer, tmp_path, *files)
    with pytest.raises(UserError, match=r"notes.txt is a file; choose another --out"):
        prepared(tokenizer, tmp_path / "notes.txt", *files)
    with pytest.raises(UserError, match="memory://x: a prepared corpus is in a local folder or at gs://"):
        prepared(tokenizer, "memory://x", *files)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_writers_are_refused(files, tokenizer, tmp_path):
    writer = PreparedFolder(str(tmp_path / "out")).only_writer()
    with writer, pytest.raises(UserError, match="is being written by another process; wait for it"):
        prepared(tokenizer, tmp_path / "out", *files)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_records(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    path.write_text(path.read_text() + '{"text": 3}\n{"body": ""}\n')
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"a.jsonl:31: the text is not a string but int; fix it, or skip such"):
        prepared(tokenizer, out, path)
    manifest = prepared(tokenizer, out, path, on_bad_record=OnBadRecord.SKIP)
    assert manifest.left_out.bad_records == 2
    assert manifest.left_out.first_bad_record.endswith("a.jsonl:31: the text is not a string but int")


def test_a_source_without_text(tokenizer, tmp_path):
    full = write_jsonl(tmp_path / "a.jsonl", make_texts(9))
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"empty.jsonl holds no text; give files with text in them"):
        prepared(tokenizer, tmp_path / "out", full, empty)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_everything_is_held_out(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    with pytest.raises(UserError, match=r"of 3 documents none is left to train on \(3 held out, 0 overlapping"):
        prepared(tokenizer, tmp_path / "out", path, validation_fraction=0.999)


def test_chats_keep_their_loss_mask(tokenizer, tmp_path):
    chats = [
        [{"role": "user", "content": f"loop {n}?"}, {"role": "assistant", "content": "state " * n}] for n in range(1, 9)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = SourceConfig(path=str(path), kind=RecordKind.CHAT)
    prepared(tokenizer, tmp_path / "out", sources=(source,), validation_fraction=0.0, sequence_length=64)
    found = [(s.tokens.tolist(), s.loss_mask.tolist()) for s in segments(open_prepared(str(tmp_path / "out")).train)]
    messages = [tuple(Message(**message) for message in chat) for chat in chats]
    wanted = [piece for chat in messages for piece in pieces(to_example(chat, tokenizer), 64)]
    assert sorted(found) == sorted((piece.tokens.tolist(), piece.loss_mask.tolist()) for piece in wanted)
    with pytest.raises(UserError, match=r"the tokenizer has no token <\|im_start\|>, which the chat format needs"):
        order(SymbolTokenizer(["a"]), sources=(source,))


def unclean(folder):
    """Returns texts, one with an evaluation item and one near-duplicate, their file, and settings that drop both."""
    pytest.importorskip("datasketch")
    texts = [f"{text} number {n}" for n, text in enumerate(make_texts(40)) if len(text) > 100]
    item = " ".join(f"word{n}" for n in range(20))
    texts[5] += " " + item
    texts.append(texts[3] + " once more")
    (folder / "items.txt").write_text(item + "\n")
    changes = {
        "decontaminate": (str(folder / "items.txt"),),
        "near_duplicates": 0.8,
        "validation_fraction": 0.0,
        "sequence_length": 512,
    }
    return texts, write_jsonl(folder / "a.jsonl", texts), changes


@pytest.mark.slow
def test_the_bytes_of_a_cleaned_corpus_do_not_depend_on_the_number_of_workers(tokenizer, tmp_path):
    _, path, changes = unclean(tmp_path)
    for workers in (1, 2):
        prepared(tokenizer, tmp_path / str(workers), path, workers=workers, **changes)
    assert content(tmp_path / "2") == content(tmp_path / "1")


def test_overlaps_and_near_duplicates_are_left_out_and_reported(tokenizer, tmp_path):
    texts, path, changes = unclean(tmp_path)
    manifest = prepared(tokenizer, tmp_path / "one", path, **changes)
    assert manifest.left_out.overlapping == 1
    assert manifest.left_out.near_duplicates >= 1
    found, _ = texts_of(tokenizer, tmp_path / "one")
    assert texts[5] not in found
    assert texts[-1] not in found
    assert texts[3] in found
    assert len(found) == len(texts) - 1 - manifest.left_out.near_duplicates
    report = json.loads((tmp_path / "one" / "cleaning.json").read_text())
    assert report["decontamination"]["files"][0]["found"] == 1
    assert report["near_duplicates"]["dropped"] == manifest.left_out.near_duplicates
    page = (tmp_path / "one" / "cleaning.md").read_text()
    assert "## Decontamination" in page
    assert "## Near-duplicates" in page
    assert not (tmp_path / "one" / "signatures").exists()


def test_damage_is_found_and_named(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    shard = out / "train-00001.arrayrecord"
    changed = bytearray(shard.read_bytes())
    changed[len(changed) // 2] ^= 1
    shard.write_bytes(changed)
    (out / "train-00002.arrayrecord").write_bytes(b"")
    held_out = open_prepared(str(out)).manifest.validation[0].name
    (out / held_out).unlink()
    (out / "tokenizer.model").unlink()
    lines = verify(open_prepared(str(out)))
    assert [line.split(" (")[0].split("/")[-1] for line in lines] == [
        "train-00001.arrayrecord is damaged or missing",
        "train-00002.arrayrecord is damaged or missing",
        f"{held_out} is damaged or missing",
        "tokenizer.model: there is no such file; copy the folder again",
    ]
    assert "(its bytes have changed); copy it again, or remove it and run the same" in lines[0]
    rows = open_prepared(str(out)).train
    with pytest.raises(UserError, match=r"train-00001.arrayrecord is damaged or missing \("):
        list(map(rows.__getitem__, range(len(rows))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "manifest.json is damaged"),
        ("{}", "manifest.json is of version None, and this is version 1; prepare the corpus again"),
        ('{"plan": {"version": 1}}', "manifest.json is damaged .*missing field"),
    ],
)
def test_a_manifest_that_is_none(content, message, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_prepared(str(tmp_path))


def test_no_manifest(tmp_path):
    with pytest.raises(UserError, match="holds no prepared corpus; `looplm tokenize` prepares one"):
        open_prepared(str(tmp_path))


def test_a_worker_that_is_killed(files, tokenizer, tmp_path):
    class Killer(Silent):
        def begin(self, what, *, bytes, done):
            import multiprocessing
            import threading

            def kill():
                while not (children := multiprocessing.active_children()):
                    time.sleep(0.01)
                children[0].kill()

            threading.Thread(target=kill).start()

    with pytest.raises(UserError, match="a worker was killed, perhaps for lack of memory; run the same"):
        prepare(order(tokenizer, *files), str(tmp_path / "out"), workers=1, watcher=Killer())
