"""A disk that refuses writes: one line at every place where a run writes, and existing files are unchanged."""

import contextlib
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys

import pytest
from full_disk import files_of_at_most
from quick_looplm import SHUFFLED_PIECES
from xla_flags import QUICK_TO_COMPILE

from looplm_jax.checkpoints import inspect_steps
from looplm_jax.cli.main import main
from looplm_jax.training._metrics import TRAIN, MetricsLog, read_metrics


def good_steps(run):
    return [report.step for report in inspect_steps(str(run)) if not report.damage]


@pytest.fixture
def refused(capsys):
    """Returns the line with which a command ends."""

    def run(*arguments):
        capsys.readouterr()
        assert main(["train", *map(str, arguments)]) == 2
        run.said = capsys.readouterr().err
        lines = run.said.splitlines()
        assert lines[-1].startswith("looplm: ")
        assert sum(line.startswith("looplm: ") for line in lines) == 1
        assert not any("Traceback" in line for line in lines)
        return lines[-1].removeprefix("looplm: ")

    return run


def test_the_recipe(recipe_file, tmp_path, refused):
    run = tmp_path / "run"
    with files_of_at_most(500):
        line = refused("--recipe", recipe_file, "--out", run)
    assert line == f"{run}/config.json cannot be written (File too large); fix that and run the same command again"
    assert not run.exists()


def test_the_recipe_of_a_run_that_goes_on(recipe_file, trained, tmp_path, refused):
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with files_of_at_most(500):
        assert "config.json cannot be written" in refused("--recipe", recipe_file, "--out", run, "--log_every", "2")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_tokenizer(tmp_path, refused):
    letters = random.Random(0)
    words = ("".join(letters.choices(string.ascii_lowercase, k=6)) for _ in range(4000))
    (tmp_path / "book.txt").write_text("\n\n".join(f"{word} is a word of a book." * 9 for word in words))
    run = tmp_path / "run"
    arguments = ["--data", tmp_path / "book.txt", "--data.validation_fraction", "0.3", "--model.vocab_size", "900"]
    with files_of_at_most(10_000):  # more than the configuration has
        line = refused(*arguments, "--out", run)
    assert line.startswith(f"{run}/tokenizer.model cannot be written (File too large); fix that")
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_the_metrics(recipe_file, trained, tmp_path, refused):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "4")
    rows = [row for row in read_metrics(run) if row["step"] <= 2]
    rows.append({"kind": "note", "step": 2, "text": "x" * 5000})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    longest = (run / "metrics.jsonl").stat().st_size + 100
    with files_of_at_most(longest):
        line = refused("--recipe", recipe_file, "--out", run)
    assert line.startswith(f"File too large while saving step 4 to {run}/checkpoints: fix that and resume; step 2 is")
    said = refused.said
    assert said.count("NOT WRITTEN") == 2
    assert f"NOT WRITTEN: {run}/metrics.jsonl (File too large): kept in memory, and retried with the next line" in said
    assert f"NOT WRITTEN: {run}/metrics.jsonl (File too large): the last lines are lost; fix that before" in said
    assert good_steps(run) == [2]
    assert main(["train", "--recipe", str(recipe_file), "--out", str(run)]) == 0
    assert read_metrics(run)[: len(rows)] == rows
    assert (run / "checkpoints" / "4").exists()


def test_metrics_that_a_disk_refuses_for_a_while_are_written_later(tmp_path):
    said = []
    log = MetricsLog(tmp_path, step=0, warn=said.append)
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 4):
        with files_of_at_most(path.stat().st_size + 9) if step == 2 else contextlib.nullcontext():
            log.write(TRAIN, step, {"loss": 1 / step})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert said == [
        f"NOT WRITTEN: {path} (File too large): kept in memory, and retried with the next line; training continues",
        f"{path} is written again; nothing is missing",
    ]


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may make a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


LIMITED = f"""
import resource, sys
from looplm_jax.cli.main import main
from looplm_jax.data import _packing as packing
packing._SHUFFLED_PIECES = {SHUFFLED_PIECES}
if (size := int(sys.argv[1])):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main(["train", *sys.argv[2:]]))
"""


def fails_alone(*arguments, longest_file=0):
    """Returns the standard error of a separate process, to which threads of a failed save must not write either."""
    command = [sys.executable, "-c", LIMITED, str(longest_file), *map(str, arguments)]
    environment = {**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE, "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a full disk would truncate shared entries
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == 1, done.stderr
    return lines[0]


PROGRESS = re.compile("command: .* writing to|compiling stage|resuming from step|only  step |note: ")


@pytest.mark.slow  # its short forms: test_the_metrics here, and in tests/checkpoints a process that saves alone
def test_a_checkpoint(recipe_file, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "4")
    line = fails_alone("--recipe", recipe_file, "--out", run, longest_file=12_000)
    where = f"step 4 to {run}/checkpoints"
    assert line == f"looplm: File too large while saving {where}: fix that and resume; step 2 is the latest valid one"
    assert good_steps(run) == [2]


@pytest.mark.slow
def test_a_disk_that_is_full(recipe_file, small_disk, refused):
    line = fails_alone("--recipe", recipe_file, "--out", small_disk / "run")
    assert line.startswith("looplm: no space left on the disk while saving step ")
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as stream:
        stream.write(bytes(65536))
    line = refused("--recipe", recipe_file, "--out", small_disk / "other")
    assert "cannot be written (no space left on the disk); fix that and run the same command again" in line
