"""A run folder has at most one process, and a run ends when its folder is taken away."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from run_processes import Run, metrics, steps_logged, write_recipe
from training_cases import RECIPE, STAGE, one_stage

from looplm_jax.checkpoints import inspect_steps
from looplm_jax.config import CheckpointConfig
from looplm_jax.errors import UserError
from looplm_jax.training import _ownership as ownership
from looplm_jax.training._ownership import OWNER_FILE, STALE_SECONDS, HeldElsewhereError, Owner, own
from looplm_jax.training.run import train

SHORT = one_stage(dataclasses.replace(STAGE, steps=8, min_loops=0), checkpoint=CheckpointConfig(every=2))
LONG = one_stage(dataclasses.replace(STAGE, steps=400, min_loops=0), checkpoint=CheckpointConfig(every=50))
HOLD = """
import sys, time
from pathlib import Path
from looplm_jax.training._ownership import own
with own(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
LOST = r"was moved, removed or taken over by another process while this one trained in it; nothing more is written"


def quiet():
    return Console(file=io.StringIO())


def write_owner(folder, **changes):
    owner = dataclasses.replace(Owner.this_process(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / OWNER_FILE).write_text(text(owner))


def text(owner):
    return json.dumps(dataclasses.asdict(owner))


def check_until(deadline, owned, between):
    while time.monotonic() < deadline:
        between()
        owned.check()


def refused(folder, kind=UserError):
    with pytest.raises(kind) as error, own(folder):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def holder(tmp_path):
    """Starts another process that owns a folder."""
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process, folder
        finally:
            process.kill()


def test_a_folder_that_another_process_holds_is_refused_and_free_once_it_is_killed(holder):
    process, folder = holder
    before = (folder / OWNER_FILE).read_text()
    assert refused(folder).startswith(f"{folder} is in use by process {process.pid} on ")
    assert refused(folder).endswith("wait for it or stop it, or choose another --out")
    assert (folder / OWNER_FILE).read_text() == before
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with own(folder) as owned:
        owned.check()
    assert list(folder.iterdir()) == []


@pytest.mark.slow  # the test before has its short form
def test_a_second_trainer_is_refused_and_the_log_of_the_first_is_whole(tmp_path, compiled_programs, capsys):
    from looplm_jax.cli.main import main

    recipe, folder = write_recipe(tmp_path / "long.json", LONG), tmp_path / "run"
    with Run("--recipe", recipe, "--out", folder, errors=tmp_path / "errors", compiled=compiled_programs) as first:
        first.wait_until(lambda: steps_logged(folder) >= 3)
        assert main(["train", "--recipe", str(recipe), "--out", str(folder)]) == 2
        assert f"looplm: {folder} is in use by process {first.process.pid} on " in capsys.readouterr().err
        first.stop(signal.SIGTERM)
        assert first.finish() == 128 + signal.SIGTERM
    assert [row["step"] for row in metrics(folder, ("train",))] == list(range(1, steps_logged(folder) + 1))
    assert not (folder / OWNER_FILE).exists()


def test_a_holder_that_has_just_removed_its_file_is_another_process(tmp_path, monkeypatch):
    def gone(path):
        raise FileNotFoundError(path)

    with own(tmp_path):
        monkeypatch.setattr(type(tmp_path), "read_bytes", gone)
        assert refused(tmp_path).startswith(f"{tmp_path} is in use by another process, which trains in it; wait")


@pytest.mark.parametrize("start", ["new", "empty"])
def test_a_run_that_fails_leaves_no_folder_of_its_own(start, tmp_path):
    if start == "empty":
        (tmp_path / "run").mkdir()
    with pytest.raises(LookupError), own(tmp_path / "run"):
        raise LookupError
    assert (tmp_path / "run").exists() == (start == "empty")


def test_errors_of_the_block_are_not_those_of_the_folder(tmp_path):
    with pytest.raises(PermissionError, match="of the block"), own(tmp_path / "run"):
        raise PermissionError(13, "of the block")


def test_a_machine_that_is_alive_is_refused_until_its_heartbeat_is_old(tmp_path):
    folder = tmp_path / "run"
    write_owner(folder, boot="other", host="elsewhere", pid=7, heartbeat=time.time() - 5)
    message = refused(folder, HeldElsewhereError)
    assert message.startswith(
        f"{folder} is in use by process 7 on elsewhere, alive 5 s ago; stop it, or choose another"
    )
    assert message.endswith(f"or remove {folder / OWNER_FILE} to take over now")
    assert HeldElsewhereError.status == 75  # supervisors try again
    write_owner(folder, boot="other", host="elsewhere", heartbeat=time.time() - STALE_SECONDS - 1)
    with own(folder) as owned:
        owned.check()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[]", b"{}", b'{"pid": "7"}', b"[" * 100_000, b"\xff"])
def test_a_damaged_owner_file_holds_nobody_up(content, tmp_path):
    (tmp_path / OWNER_FILE).write_bytes(content)
    with own(tmp_path) as owned:
        owned.check()


def test_a_process_is_alive_only_as_itself():
    mine = Owner.this_process()
    assert mine.is_alive()
    assert not dataclasses.replace(mine, process_start="1").is_alive()
    assert not dataclasses.replace(mine, pid=2**22 + 1, process_start="1").is_alive()
    assert dataclasses.replace(mine, host="a container", pid=1).is_alive()


def test_the_heartbeat_goes_on_and_notices_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.01)
    deadline = time.monotonic() + 30
    with own(tmp_path) as owned:
        first = json.loads((tmp_path / OWNER_FILE).read_text())["heartbeat"]
        while json.loads((tmp_path / OWNER_FILE).read_text())["heartbeat"] == first:
            assert time.monotonic() < deadline
        other = dataclasses.replace(Owner.this_process(), boot="other")
        with pytest.raises(UserError, match=LOST):
            check_until(deadline, owned, lambda: (tmp_path / OWNER_FILE).write_text(text(other)))
    assert json.loads((tmp_path / OWNER_FILE).read_text())["token"] == other.token


def test_an_owner_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / OWNER_FILE).symlink_to(tmp_path / "mine.txt")
    assert "cannot be written" in refused(tmp_path / "run")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def moved(folder):
    folder.rename(folder.with_name("elsewhere"))


def removed(folder):
    while folder.exists():  # a save may create files in it at the same time
        shutil.rmtree(folder, ignore_errors=True)


def replaced(folder):
    moved(folder)
    folder.mkdir()


@pytest.mark.parametrize("change", [moved, removed, replaced])
def test_a_folder_that_is_moved_or_removed_is_noticed(change, tmp_path):
    folder = tmp_path / "run"
    with own(folder) as owned:
        owned.check()
        change(folder)
        with pytest.raises(UserError, match=LOST):
            owned.check()


def test_an_error_that_follows_from_a_lost_folder_names_the_folder(tmp_path):
    folder = tmp_path / "run"

    def fail():
        with own(folder):
            shutil.rmtree(folder)
            raise ValueError("a save found none of its files")

    with pytest.raises(UserError, match=LOST) as error:
        fail()
    assert isinstance(error.value.__context__, ValueError)


@pytest.mark.slow
@pytest.mark.parametrize("change", [moved, removed, replaced])
def test_a_folder_that_is_moved_or_removed_ends_the_run_and_nothing_is_written_in_its_place(change, tmp_path):
    folder, seen = tmp_path / "run", []

    def evaluate(model, params, held_out):
        seen.append(len(list((folder / "checkpoints").iterdir())))
        change(folder)
        return {}

    with pytest.raises(UserError, match=LOST) as error:
        train(SHORT, folder, evaluate=evaluate, console=quiet())
    assert "\n" not in str(error.value)
    assert len(seen) == 1
    assert not folder.exists() or list(folder.iterdir()) == []
    if change is moved:
        folder.with_name("elsewhere").rename(folder)
        assert train(SHORT, folder, console=quiet()).step == 8
        assert [report.damage for report in inspect_steps(str(folder))] == [None] * 3
        assert [row["step"] for row in metrics(folder, ("train",))] == list(range(1, 9))
    assert RECIPE.evaluation.every < 8
