"""The training command of the README at a small size: text, JSON lines and Parquet, local and at a URL."""

import json
import os
import subprocess
import sys

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from xla_flags import QUICK_TO_COMPILE

from looplm_jax import load
from looplm_jax.cli.main import main
from looplm_jax.training._metrics import read_metrics

SMALL = (
    *("--model.vocab_size=320", "--model.width=16", "--model.mlp_width=24", "--model.num_layers=1"),
    *("--model.num_heads=2", "--model.loops=2", "--stage.loops=2", "--stage.steps=2", "--stage.warmup_steps=0"),
    *("--stage.decay_steps=0", "--stage.batch_size=2", "--stage.sequence_length=32", "--mesh.data=1"),
    *("--evaluation.sequences=4", "--log_every=1", "--compute.remat=none", "--data.validation_fraction=0.1"),
)


def paragraphs(kind):
    return [f"Document {n} of the {kind}: " + f"loop {n % 7} reads state {n % 11}, " * 40 for n in range(60)]


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "book.txt").write_text("\n\n".join(paragraphs("book")))
    lines = [json.dumps({"text": text}) + "\n" for text in paragraphs("lines")]
    lines.insert(7, '{"text": \n')
    (folder / "lines.jsonl").write_text("".join(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": paragraphs("table")}), folder / "table.parquet")
    return folder


def test_every_kind_of_file(mine, tmp_path, monkeypatch, capsys):
    fsspec.filesystem("memory").pipe("/users_line/more.txt", "\n\n".join(paragraphs("memory")).encode())
    monkeypatch.chdir(tmp_path)
    sources = ["mine/*.txt", "mine/*.jsonl", "mine/table.parquet", "memory://users_line/more.txt"]
    arguments = ["train", "--recipe", "text-small", *(f"--data={source}" for source in sources), *SMALL]
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"looplm: {mine}/lines.jsonl:8: not JSON")
    assert main([*arguments, "--on-bad-record", "skip"]) == 0
    printed = capsys.readouterr()
    written, following = printed.out.splitlines()
    assert written.startswith("trained 4 steps; wrote checkpoints, metrics.jsonl, tensorboard, report.md")
    assert following == "next: looplm evaluate runs/text-small"
    assert "training a tokenizer of 320 pieces" in printed.err
    run = tmp_path / "runs" / "text-small"
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "tokenizer.model", "report.md"} <= {
        path.name for path in run.iterdir()
    }
    rows = [(row["kind"], row["step"]) for row in read_metrics(run)]
    assert rows == [("train", 1), ("train", 2), ("evaluation", 2), ("train", 3), ("train", 4), ("evaluation", 4)]
    loaded = load(run)
    assert loaded.step == 4
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("loop 3")) == "loop 3"
    assert main(["inspect", str(run)]) == 0
    (run / "tokenizer.model").unlink()
    assert main([*arguments, "--on-bad-record", "skip"]) == 0
    assert "resuming from step 4 of stage gate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_url_in_a_process_of_its_own(mine, tmp_path):
    (mine / "lines.jsonl").unlink()
    command = [
        sys.executable,
        "-m",
        "looplm_jax.cli.main",
        "train",
        "--recipe",
        "text-small",
        "--data",
        f"file://{mine}",
    ]
    environment = {**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--out", "here", *SMALL], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "next: looplm evaluate here"
    announcement, *_ = done.stderr.splitlines()
    assert announcement.endswith("pretrain (2 steps, 2 loops), gate (2 steps, 2 loops); writing to here")
    assert load(tmp_path / "here").step == 4
