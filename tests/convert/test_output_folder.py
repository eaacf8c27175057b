"""Output folders are written atomically: what remains after success, errors, interrupts, kills and full disks."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from processes import running

from looplm_jax.errors import UserError
from looplm_jax.files import staged_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_all_is_written(tmp_path):
    out = tmp_path / "new" / "out"
    with staged_folder(out) as staging:
        (staging / "a").write_text("all of it")
        assert not out.exists()
        assert staging.parent == out.parent
    assert (out / "a").read_text() == "all of it"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("make", [lambda out: None, lambda out: out.mkdir()])
def test_an_absent_and_an_empty_folder_will_do(tmp_path, make):
    out = tmp_path / "out"
    make(out)
    with staged_folder(out) as staging:
        (staging / "a").touch()
    assert names(out) == ["a"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with staged_folder(tmp_path / "out") as staging:
        (staging / "a").touch()
    assert names(tmp_path / "disk") == ["a"]
    assert (tmp_path / "out").is_symlink()


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged_folder("out") as staging:
        (staging / "a").touch()
    assert names(tmp_path) == ["out"]


def write_half(out, failure):
    """Fails when half of the folder is written."""
    with staged_folder(out) as staging:
        (staging / "folder").mkdir()
        (staging / "folder" / "half").write_text("half")
        raise failure


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, RuntimeError, UserError])
def test_any_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure):
        write_half(tmp_path / "out", failure)
    assert names(tmp_path) == []


def refusal(out):
    """Returns the line with which a folder is refused, before the body runs."""
    with pytest.raises(UserError) as raised, staged_folder(out):
        pytest.fail("the body ran")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_with_anything_in_it_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("kept")
    assert refusal(tmp_path / "out") == f"{tmp_path}/out is not empty; choose another folder"
    assert (tmp_path / "out" / ".hidden").read_text() == "kept"
    assert names(tmp_path) == ["out"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("kept")
    assert refusal(tmp_path / "out") == f"{tmp_path}/out is a file; choose another folder"
    assert (tmp_path / "out").read_text() == "kept"


def test_a_folder_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(".") == ". is the current folder or a mount point; name a new folder inside it"


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file" / "out").startswith(f"{tmp_path}/file/out cannot be written (")


def test_something_that_came_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"

    def write():
        with staged_folder(out) as staging:
            (staging / "a").touch()
            out.mkdir()
            (out / "theirs").touch()

    with pytest.raises(UserError, match="out cannot be written"):
        write()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["theirs"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(tmp_path, code):
    with pytest.raises(UserError) as raised:
        write_half(tmp_path / "out", OSError(code, os.strerror(code)))
    assert str(raised.value) == (
        f"{tmp_path}/out cannot be written (no space left on the disk); fix that and run the same command again"
    )
    assert names(tmp_path) == []


def test_mistakes_name_the_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^cannot write out/checkpoints/0$"), staged_folder("out") as staging:
        raise UserError(f"cannot write {staging}/checkpoints/0")


HALF_WAY = """
import sys, time
from looplm_jax.files import staged_folder
with staged_folder(sys.argv[1]) as staging:
    (staging / "folder").mkdir()
    (staging / "folder" / "half").write_text("half")
    (staging / "link").symlink_to("/")
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def half_way(tmp_path):
    """Starts a process that is writing `out`."""
    with running([sys.executable, "-c", HALF_WAY, tmp_path / "out"], stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout.readline() == "half\n"
        yield it


def test_two_processes_do_not_write_one_folder(tmp_path, half_way):
    line = refusal(tmp_path / "out")
    assert line == f"{tmp_path}/out is being written by another process; choose another folder"
    assert names(tmp_path / ".out.partial") == ["folder", "link"]


def test_what_a_killed_process_left_is_removed(tmp_path, half_way):
    half_way.send_signal(signal.SIGKILL)
    half_way.wait()
    assert names(tmp_path) == [".out.partial"]
    with staged_folder(tmp_path / "out") as staging:
        (staging / "a").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def test_an_interrupted_process_leaves_nothing(tmp_path, half_way):
    half_way.send_signal(signal.SIGINT)
    half_way.wait()
    assert names(tmp_path) == []
