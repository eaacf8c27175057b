import errno
import subprocess
import sys
import tempfile

import jax
import pytest

from looplm_jax.cli import commands
from looplm_jax.cli.main import exit_status, main


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in ("train", "evaluate", "generate", "chat", "inspect"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("looplm_jax 0")


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "chat", "inspect"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: looplm {command} ")
    assert f"looplm {command} " in printed[20:]  # an example command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (
            ["dance"],
            "unknown command 'dance'; known: chat, convert, evaluate, generate, inspect, plan, tokenize, train",
        ),
        (["inspect"], "the following arguments are required: checkpoint; see `looplm inspect --help`"),
        (["inspect", "x", "--jsn"], "unknown argument '--jsn'; did you mean '--json'?"),
        (["inspect", "x", "--colour=red"], "unknown argument '--colour=red'; `looplm inspect --help` lists the flags"),
        (["inspect", "x", "--step"], "argument --step: expected one argument; see `looplm inspect --help`"),
        (["inspect", "x", "--step", "two"], "argument --step: invalid int value: 'two'; see `looplm inspect --help`"),
        (["inspect", "x", "y"], "unknown argument 'y'; `looplm inspect --help` lists the flags"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"looplm: {message}\n")


def test_without_a_temporary_folder_a_command_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/does/not/exist"])
    assert exit_status(lambda: int(tempfile.mkdtemp())) == 2
    assert capsys.readouterr().err == (
        "looplm: No usable temporary directory found in ['/does/not/exist']; set TMPDIR to a folder that can be "
        "written to\n"
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left", "report.md"),
            2,
            "no space left on the disk while writing report.md: free",
        ),
        (
            OSError(errno.EDQUOT, "Quota exceeded"),
            2,
            "no space left on the disk: free some and run the same command again",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, status, message, capsys, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(commands, "run_inspect", fail)
    assert main(["inspect", "x"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"looplm: {message}")


def test_a_mistake_of_the_program_is_not_hidden(monkeypatch):
    def fail(_):
        raise OSError("something else")

    monkeypatch.setattr(commands, "run_inspect", fail)
    with pytest.raises(OSError, match="something else"):
        main(["inspect", "x"])


def test_a_reader_that_goes_away_is_no_mistake(monkeypatch):
    def fail(_):
        raise BrokenPipeError

    monkeypatch.setattr(commands, "run_inspect", fail)
    assert main(["inspect", "x"]) == 0


def test_help_does_not_wait_for_jax():
    program = "import sys; from looplm_jax.cli.main import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("command", [["train", "--out"], ["evaluate"], ["generate", "--prompt=1"]])
def test_programs_that_nobody_may_compile_are_refused_in_one_line(command, recipe_file, tmp_path, capsys):
    given = ["--recipe", str(recipe_file)] if command[0] == "train" else []
    with jax.disable_jit():
        assert main([*command, str(tmp_path / "run"), *given]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "looplm: this command runs compiled programs; unset JAX_DISABLE_JIT"
    assert not (tmp_path / "run").exists()
