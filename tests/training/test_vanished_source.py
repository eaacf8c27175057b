"""A folder of files is moved away while a run reads it, and comes back at once, or after the run has given up."""

import dataclasses

import pytest
from run_processes import Run, metrics, newest, steps_logged, write_recipe
from training_cases import MODEL, STAGE, assert_identical, one_stage

from looplm_jax.cli.main import main
from looplm_jax.config import CheckpointConfig, DataConfig, SourceConfig
from looplm_jax.data import _packing as packing
from looplm_jax.data.tokenizers import train_sentencepiece

WINDOW = 64  # the pieces that are read before the first is needed
SLOW_AND_IMPATIENT = f"""
import functools, sys, time
from looplm_jax.cli.main import main
from looplm_jax.data import _packing as packing
from looplm_jax.training import _batches as reading
from looplm_jax.training import run
packing._SHUFFLED_PIECES = {WINDOW}
to_device = run.to_device
run.to_device = lambda *arguments: time.sleep(0.04) or to_device(*arguments)
reading.RetryingReader = functools.partial(reading.RetryingReader, waits=(2.0, 0.1))
sys.exit(main(sys.argv[1:]))
"""
STEPS, VOCABULARY = 150, 300
WORDS = ["loop", "gate", "step", "exit", "token", "state", "layer", "depth", "share", "early", "deep", "trace"]


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for book in range(4):
        pages = (" ".join(f"{WORDS[(page * k + book) % 12]} {page * k}" for k in range(8)) for page in range(300))
        (folder / f"{book}.jsonl").write_text("".join(f'{{"text": "{page}"}}\n' for page in pages))
    return folder


@pytest.fixture
def recipe(books, tmp_path):
    texts = [book.read_text() for book in books.iterdir()]
    (tmp_path / "pieces.model").write_bytes(train_sentencepiece(texts, VOCABULARY).serialize())
    return write_recipe(
        tmp_path / "books.json",
        one_stage(
            dataclasses.replace(STAGE, steps=STEPS, min_loops=0, batch_size=8, sequence_length=64),
            model=dataclasses.replace(MODEL, vocab_size=VOCABULARY),
            data=DataConfig(
                sources=(SourceConfig(path=str(books)),),
                tokenizer=str(tmp_path / "pieces.model"),
                validation_fraction=0.0,
            ),
            checkpoint=CheckpointConfig(every=1000),
        ),
    )


@pytest.mark.slow
def test_a_folder_that_vanishes(books, recipe, compiled_programs, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_SHUFFLED_PIECES", WINDOW)
    folder, away = tmp_path / "run", tmp_path / "away"
    arguments = ("--recipe", recipe, "--out", folder)
    with Run(*arguments, errors=tmp_path / "errors", compiled=compiled_programs, program=SLOW_AND_IMPATIENT) as run:
        run.wait_until(lambda: steps_logged(folder) > 3)
        books.rename(away)
        run.wait_until(lambda: "trying again in 2 s" in run.said)
        away.rename(books)
        gone = steps_logged(folder)
        run.wait_until(lambda: steps_logged(folder) > gone + 3)
        books.rename(away)
        assert run.finish() == 2, run.said
        warnings = [line for line in run.said.splitlines() if line.startswith("warning: ")]
        last = run.said.splitlines()[-1]
        assert "Traceback" not in run.said
    assert [line.split("; ")[-1] for line in warnings] == [f"trying again in {wait} s" for wait in ("2", "2", "0.1")]
    assert all(str(books) in line for line in warnings)
    step = newest(folder)["step"]
    assert gone + 3 < step == steps_logged(folder) < STEPS
    assert last.startswith(f"looplm: {books}/")
    assert last.endswith(f"; step {step} is saved; fix that, and the same command resumes from there")

    away.rename(books)
    assert main(["train", *map(str, arguments)]) == 0
    assert main(["train", "--recipe", str(recipe), "--out", str(tmp_path / "untouched")]) == 0
    ours, wanted = newest(folder), newest(tmp_path / "untouched")
    assert ours["data"] == wanted["data"]
    assert_identical(ours["state"], wanted["state"])
    assert metrics(folder) == metrics(tmp_path / "untouched")
