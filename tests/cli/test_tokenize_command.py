"""`looplm tokenize`: its output and messages, what it refuses, how it stops, and training on the prepared corpus."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from full_disk import files_of_at_most
from processes import running

from looplm_jax.checkpoints import inspect_steps
from looplm_jax.cli.main import main
from looplm_jax.codec import to_dict
from looplm_jax.config import SourceConfig
from looplm_jax.data.tokenizers import SymbolTokenizer, train_sentencepiece
from looplm_jax.training._metrics import read_metrics

ADJECTIVES, NOUNS = ("deep", "shared", "looped", "gated", "early"), ("layer", "state", "exit", "token", "step", "loss")
TEXTS = [
    f"Text {n}. " + " ".join(f"{ADJECTIVES[n * k % 5]} {NOUNS[(n + k) % 6]}," for k in range(n % 20 + 3))
    for n in range(150)
]
LENGTH = ["--sequence-length", "16"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Changes to a working folder with two files and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    for name, texts in (("a", TEXTS[:100]), ("b", TEXTS[100:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("t.model").write_bytes(TOKENIZER.serialize())
    return tmp_path


TOKENIZER = train_sentencepiece(TEXTS, 300)


@pytest.fixture
def refused(capsys):
    """Returns the one line with which a command ends."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments]) == 2
        printed = capsys.readouterr()
        last = printed.err.splitlines()[-1]
        assert sum(line.startswith("looplm: ") for line in printed.err.splitlines()) == 1
        assert printed.out == ""
        return last.removeprefix("looplm: ")

    return run


def tokenize(*arguments: str) -> int:
    return main(["tokenize", *arguments, "--tokenizer", "t.model", *LENGTH, "--workers", "1"])


def test_it_says_what_it_wrote_and_what_to_type_next(here, capsys):
    assert tokenize("a.jsonl", "b.jsonl", "--out", "out", "--validation-fraction", "0.1", "--verify") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("150 documents became ")
    assert lines[1] == f"wrote 1 shards to train on, 1 held out, to {here}/out"
    assert lines[2] == "next: looplm train --data out --stage.sequence_length 16 --model.vocab_size 300"
    assert lines[3].startswith("out is intact: 2 shards, ")
    assert main(["inspect", "out"]) == 0
    shown = capsys.readouterr().out
    assert "tokenizer sentencepiece of 300 tokens" in shown
    assert "a.jsonl" in shown
    assert "next: looplm tokenize --verify --out out" in shown
    assert main(["inspect", "out", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["plan"]["sequence_length"] == 16
    assert {"train", "validation", "sources", "left_out", "digest"} <= set(manifest)


MISTAKES = [
    (["--out", "out"], "there is nothing to prepare; name files, for example looplm tokenize 'mine/*.jsonl'"),
    (["a.jsonl"], "the following arguments are required: --out; see `looplm tokenize --help`"),
    (["a.jsonl", "--out", "out", *LENGTH], "say which tokenizer: --tokenizer PATH, a SentencePiece .model, a"),
    (["a.jsonl", "--out", "out", "--tokenizer", "t.model"], "say how long a row is: --sequence-length S"),
    (["a.jsonl", "--out", "out", "--tokenizer", "none.model", *LENGTH], "none.model: there is no such file"),
    (["a.jsonl", "--out", "out", "--tokenizer", "a.jsonl", *LENGTH], "a.jsonl: a tokenizer is a SentencePiece"),
    (["a.jsonl", "--out", "out", "--tokenizer", "t.model", "--sequence-length", "0"], "--sequence-length must be at"),
    (["a.jsonl", "--out", "out", "--tokenizer", "t.model", *LENGTH, "--validation-fraction", "1"], "--validation-frac"),
    (["a.jsonl", "--out", "out", "--tokenizer", "t.model", *LENGTH, "--workers", "0"], "--workers must be at least 1"),
    (["no/*.txt", "--out", "out", "--tokenizer", "t.model", *LENGTH], "no file matches 'no/*.txt'; check the path"),
    (["a.jsonl", "--out", "a.jsonl", "--tokenizer", "t.model", *LENGTH], "{here}/a.jsonl is a file; choose another"),
    (["a.jsonl", "--out", ".", "--tokenizer", "t.model", *LENGTH], "{here} is not empty and holds no prepared corpus"),
    (["a.jsonl", "--out", "s3://x", "--tokenizer", "t.model", *LENGTH], "s3://x: a prepared corpus is in a local"),
    (["--verify", "--out", "out"], "{here}/out holds no prepared corpus; `looplm tokenize` prepares one"),
    (
        ["a.jsonl", "--out", "out", "--tokenizer", "t.model", *LENGTH, "--decontaminate", "none.txt"],
        "no file matches 'none.txt'",
    ),
    (
        ["a.jsonl", "--out", "out", "--tokenizer", "t.model", *LENGTH, "--near-duplicates", "1.5"],
        "near-duplicates: threshold is 1.5",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, message, here, refused):
    before = sorted(here.rglob("*"))
    assert refused("tokenize", *arguments).startswith(message.format(here=here))
    assert sorted(here.rglob("*")) == before


def test_chats_need_a_tokenizer_for_chats(here, refused):
    Path("s.json").write_bytes(b"{}")
    symbols = SymbolTokenizer(["a"])
    assert symbols.token_id("<|im_start|>") is None
    import looplm_jax.data.tokenizers as tokenizers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "load_tokenizer", lambda path, **_: symbols)
        line = refused("tokenize", "a.jsonl", "--chat", "--out", "out", "--tokenizer", "s.json", *LENGTH)
    assert line == "the tokenizer has no token <|im_start|>, which the chat format needs; use one made for chat"
    assert not Path("out").exists()


def test_bad_data_is_one_line(here, refused):
    arguments = ["--tokenizer", "t.model", *LENGTH, "--out", "out", "--workers", "1"]
    Path("bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    line = refused("tokenize", "bad.jsonl", *arguments)
    assert line.startswith(f"{here}/bad.jsonl:2: not JSON (Expecting value at column")
    Path("none.txt").write_text("")
    assert refused("tokenize", "none.txt", *arguments) == "none.txt holds no text; give files with text in them"
    assert refused("tokenize", "a.jsonl", "--text-key", "txt", *arguments).startswith(
        f"{here}/a.jsonl:1: the record has no field 'txt'; did you mean 'text'?"
    )
    assert tokenize("a.jsonl", "--out", "out") == 0


@pytest.mark.parametrize(("size", "file"), [(50, "looplm_plan.json"), (30_000, "train-00000.arrayrecord")])
def test_a_disk_that_is_full(size, file, here, refused):
    assert len(TOKENIZER.serialize()) < 30_000
    arguments = ["a.jsonl", "--tokenizer", "t.model", *LENGTH, "--out", "out", "--workers", "1"]
    with files_of_at_most(size):
        line = refused("tokenize", *arguments)
    assert line == f"{here}/out/{file} cannot be written (File too large); fix that and run the same command again"
    assert not list(Path("out").glob("*.arrayrecord"))
    assert not Path("out/.unfinished").exists()
    assert tokenize("a.jsonl", "--out", "out") == 0


def test_a_damaged_shard_is_named(here, capsys):
    assert tokenize("a.jsonl", "--out", "out") == 0
    shard = Path("out/train-00000.arrayrecord")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    capsys.readouterr()
    assert main(["tokenize", "--verify", "--out", "out"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"looplm: {here}/out/train-00000.arrayrecord is damaged or missing (it has ")
    shard.unlink()
    assert tokenize("a.jsonl", "--out", "out", "--verify") == 0
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number, here, capsys):
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) * 2000)
    command = [sys.executable, "-m", "looplm_jax.cli.main", "tokenize", "a.jsonl", "--out", "out"]
    command += ["--tokenizer", "t.model", *LENGTH, "--workers", "2"]
    with running(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(Path().glob("out/.unfinished/*")):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, number)  # to the workers too, as a terminal does
        _, printed = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert printed.splitlines()[-1] == f"looplm: stopped by {number.name}; the same command resumes there"
    assert len(printed.splitlines()) == 3
    assert printed.startswith("reading 1 file (1 .jsonl)\ntokenizing: ")
    assert sorted(path.name for path in Path("out").iterdir()) == ["looplm_plan.json", "tokenizer.model"]


@pytest.mark.slow
def test_training_on_prepared_sources_goes_on_bit_for_bit(here, recipe, refused):
    for name in "ab":
        assert tokenize(f"{name}.jsonl", "--out", name, "--validation-fraction", "0.2") == 0
    sources = (SourceConfig(path="a", weight=3.0), SourceConfig(path="b"))
    chosen = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, vocab_size=300),
        data=dataclasses.replace(recipe.data, sources=sources, validation_fraction=0.02),
    )
    Path("recipe.json").write_text(json.dumps(to_dict(chosen)))
    train = ["train", "--recipe", "recipe.json", "--out"]
    assert main([*train, "whole"]) == 0
    shutil.copytree("whole", "stopped")
    shutil.rmtree("stopped/checkpoints/4")  # as if the run had been killed after step 2
    assert main([*train, "stopped"]) == 0
    ends = [inspect_steps(run)[0] for run in ("whole", "stopped")]
    assert [end.step for end in ends] == [4, 4]
    assert ends[0].arrays == ends[1].arrays
    assert ends[0].metadata.data_state == ends[1].metadata.data_state
    assert ends[0].metadata.data_state["lanes"]["0"]["position"] == {"batches": 4}
    held_out = [row for row in read_metrics(Path("whole")) if row["kind"] == "evaluation"]
    assert held_out
    assert not Path("whole/tokenizer.model").exists()

    def mistake(*changes):
        return refused(*train, "other", *changes)

    assert mistake("--stage.sequence_length", "32") == (
        "'a' is prepared in sequences of 16, and sequence_length is 32; set it to 16, or prepare it again"
    )
    assert mistake("--model.vocab_size", "200").startswith("the tokenizer has 300 tokens but model.vocab_size is 200")
    Path("other.model").write_bytes(train_sentencepiece(TEXTS, 310).serialize())
    assert mistake("--tokenizer", "other.model").startswith("'a' is prepared with another tokenizer than other.model;")
