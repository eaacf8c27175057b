"""Compiled programs are cached for the next command; an unusable cache folder is left alone."""

import os
import subprocess
import sys
import time
import types
import warnings

import pytest
from xla_flags import QUICK_TO_COMPILE

from looplm_jax.cli import _compilation_cache
from looplm_jax.cli._compilation_cache import keep_compiled_programs


@pytest.fixture(autouse=True)
def _before_jax(monkeypatch):
    """Simulates a process that has not imported JAX yet, and restores `warnings` afterwards."""
    monkeypatch.setattr(_compilation_cache, "sys", types.SimpleNamespace(modules={}))
    with warnings.catch_warnings():
        yield


def kept_in(tmp_path, **variables):
    environment = {"XDG_CACHE_HOME": str(tmp_path), **variables}
    keep_compiled_programs(environment)
    return environment


def test_the_folder_is_the_users_own_and_bounded(tmp_path, capsys):
    environment = kept_in(tmp_path)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "looplm_jax")
    assert int(environment["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 2**30
    assert (tmp_path / "looplm_jax").stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_COMPILATION_CACHE_DIR": "/mine"},
        {"JAX_COMPILATION_CACHE_DIR": ""},
        {"JAX_ENABLE_COMPILATION_CACHE": "False"},
    ],
)
def test_what_the_environment_says_stays(tmp_path, variables):
    assert kept_in(tmp_path, **variables) == {"XDG_CACHE_HOME": str(tmp_path), **variables}
    assert list(tmp_path.iterdir()) == []
    assert kept_in(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE="7")["JAX_COMPILATION_CACHE_MAX_SIZE"] == "7"


def test_a_process_that_has_imported_jax_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(_compilation_cache, "sys", sys)
    assert kept_in(tmp_path) == {"XDG_CACHE_HOME": str(tmp_path)}


@pytest.mark.parametrize("base", ["", "relative/folder"])
def test_without_a_folder_for_caches_it_is_below_home(tmp_path, monkeypatch, base):
    monkeypatch.setenv("HOME", str(tmp_path))
    environment = {"XDG_CACHE_HOME": base}
    keep_compiled_programs(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / ".cache" / "looplm_jax")


def test_a_folder_that_cannot_be_used_is_noted_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "looplm_jax").write_text("a file")
    assert "JAX_COMPILATION_CACHE_DIR" not in kept_in(tmp_path)
    (tmp_path / "looplm_jax").unlink()
    (tmp_path / "looplm_jax").mkdir()
    (tmp_path / "looplm_jax").chmod(0o777)
    assert "JAX_COMPILATION_CACHE_DIR" not in kept_in(tmp_path)
    (tmp_path / "looplm_jax").chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "JAX_COMPILATION_CACHE_DIR" not in kept_in(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    start = f"looplm: note: compiled programs are not kept: {tmp_path / 'looplm_jax'}: "
    reasons = ["File exists", "other users may write to it; `chmod go-w", "it belongs to another user"]
    assert len(lines) == 3
    for line, reason in zip(lines, reasons, strict=True):
        assert line.startswith(start + reason)
        assert line.endswith("; --no-compilation-cache leaves this note out")


def test_entries_that_were_cut_short_are_removed_and_those_being_written_stay(tmp_path):
    folder = tmp_path / "looplm_jax"
    kept_in(tmp_path)
    for name in ("old-cache", "new-cache", "whole-cache", "whole-atime"):
        (folder / name).write_bytes(b"program")
    hour_ago = time.time() - 3600
    for name in ("old-cache", "whole-cache"):
        os.utime(folder / name, (hour_ago, hour_ago))
    kept_in(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["new-cache", "whole-atime", "whole-cache"]


def test_a_damaged_entry_is_removed_and_refused_writes_are_noted_once(tmp_path, capsys):
    kept_in(tmp_path)
    folder = tmp_path / "looplm_jax"
    for name in ("jit_tick-1a-cache", "jit_tick-1a-atime", "jit_other-2b-cache"):
        (folder / name).write_bytes(b"")
    for what in ("reading", "writing", "writing"):
        problem = f"Error {what} persistent compilation cache entry for 'jit_tick': OSError: no space"
        warnings.warn(problem, stacklevel=1)
    assert [path.name for path in folder.iterdir()] == ["jit_other-2b-cache"]
    assert capsys.readouterr().err == "looplm: note: compiled programs are not kept: OSError: no space\n"


PROGRAM = """
from looplm_jax.cli._compilation_cache import keep_compiled_programs
keep_compiled_programs()
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
step = jax.jit(lambda x: x @ x + 1, donate_argnums=0)
mesh = jax.make_mesh((2,), ("data",))
sharded = jax.device_put(jax.numpy.ones((4, 4)), jax.NamedSharding(mesh, jax.P("data")))
step(sharded).block_until_ready()
print(events.count("/jax/compilation_cache/cache_hits"), events.count("/jax/compilation_cache/cache_misses"))
"""


@pytest.mark.slow
def test_the_second_process_reads_donated_and_sharded_programs_and_replaces_a_damaged_one(tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    variables |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {QUICK_TO_COMPILE}"

    def run():
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return [int(number) for number in done.stdout.split()]

    _, compiled = run()
    assert compiled > 0
    assert run() == [compiled, 0]
    for entry in (tmp_path / "looplm_jax").glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:100])
    hits, missed = run()
    assert hits == 0
    assert missed in (0, compiled)  # an unreadable entry may count as neither
    assert run() == [compiled, 0]


def test_the_flag_turns_it_off(monkeypatch, capsys):
    from looplm_jax.cli.main import main

    called = []
    monkeypatch.setattr("looplm_jax.cli.main.keep_compiled_programs", lambda: called.append(True))
    for flags in ([], [_compilation_cache.OFF]):
        assert main(["generate", "/no/such/run", *flags]) == 2
    assert called == [True]
    capsys.readouterr()
