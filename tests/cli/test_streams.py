"""For any kind of standard output and error the result is the same, and untrusted text cannot control a terminal."""

import contextlib
import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.cli.main import main
from looplm_jax.terminal import Table, one_line, with_escapes

TITLE = "\x1b]0;pwned\x07"

# Small programs that print as a command does. They start fast, because they do not need JAX.
PRINTS = textwrap.dedent("""
    import sys
    from looplm_jax.cli import commands
    from looplm_jax.cli.main import main
    from looplm_jax.errors import UserError

    def run(arguments):
        for line in range(20_000):
            print("… 日本 line", line)
            if line % 100 == 0:
                print("progress …", line, file=sys.stderr)
        open("result", "w").write("done")
        if arguments.json:
            raise UserError("wrong … \\udc80 \\x1b[2J")
        return 0

    commands.run_inspect = run
    sys.exit(main(["inspect", *sys.argv[1:]]))
""")


def run_in_shell(line, folder, **environment):
    """Runs a shell command in which $PRINTS is the program above; returns the completed process."""
    (folder / "prints.py").write_text(PRINTS)
    variables = {**os.environ, "PRINTS": f"{sys.executable} {folder / 'prints.py'}", **environment}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=variables, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    "line",
    [
        "$PRINTS x | head -n 1; exit ${PIPESTATUS[0]}",
        "$PRINTS x 2>&1 | head -n 1; exit ${PIPESTATUS[0]}",
        "$PRINTS x 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}",
        "$PRINTS x >&-",
        "$PRINTS x 2>&-",
        "$PRINTS x 2>/dev/full",
        "$PRINTS x <&- >&- 2>&-",
    ],
)
def test_a_stream_that_is_closed_or_broken_does_not_change_the_result(line, tmp_path):
    done = run_in_shell(line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr + done.stdout
    assert b"Exception" not in done.stderr + done.stdout
    assert (tmp_path / "result").read_text() == "done"


def test_output_that_a_full_disk_refuses_is_one_line(tmp_path):
    done = run_in_shell("$PRINTS x 2>/dev/null >/dev/full; exit $?", tmp_path)
    assert done.returncode == 2
    done = run_in_shell("$PRINTS x >/dev/full", tmp_path)
    assert done.stderr.decode().splitlines()[-1] == (
        "looplm: no space left on the disk: free some and run the same command again"
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
        {"LC_ALL": "xx_YY.nonsense"},
        {"TERM": "dumb", "COLUMNS": "0", "NO_COLOR": "1"},
        {"PYTHONOPTIMIZE": "1", "TMPDIR": "/does/not/exist"},
    ],
)
def test_what_a_terminal_cannot_show_is_replaced(environment, tmp_path):
    done = run_in_shell("$PRINTS x --json; exit $?", tmp_path, **environment)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 20_000
    *progress, last = done.stderr.splitlines()
    assert sum(line.startswith(b"progress ") for line in progress) == 200
    assert last.startswith(b"looplm: wrong ")
    assert last.endswith(rb"\udc80 \x1b[2J")


@given(st.text())
def test_nothing_visible_steers_a_terminal(text):
    shown = with_escapes(text)
    assert all(character in "\n\t" or character.isprintable() or not _steers(character) for character in shown)
    assert with_escapes(shown) == shown
    assert len(one_line(text).splitlines()) <= 1
    shown.encode()


def _steers(character):
    number = ord(character)
    return number < 0x20 or 0x7F <= number < 0xA0 or 0xD800 <= number < 0xE000 or character in "\u202e\u2066\u200f"


@given(st.text(st.characters(codec="utf-8"), max_size=30), st.integers(0, 30))
def test_a_sequence_that_is_split_over_tokens_is_shown_as_it_is_in_one(text, place):
    assert with_escapes(text[:place]) + with_escapes(text[place:]) == with_escapes(text)


def test_readable_text_is_left_as_it_is():
    text = "def main():\n\treturn '日本 é 👩‍👩‍👧 שלום'\n"
    assert with_escapes(text) == text
    assert with_escapes(TITLE + "\x9b\u202e\udc80") == r"\x1b]0;pwned\x07\x9b\u202e\udc80"


def test_an_error_shows_what_it_names_as_escapes(capsys):
    assert main([f"tr{TITLE}ain"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_names_in_a_table_are_neither_markup_nor_escapes():
    from rich.console import Console

    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    name = f"[/bold] [red]x{TITLE}"
    console.print(Table(title=name, columns=(name,), rows=((name,),)).rich())
    console.file.close()
    assert console.export_text(clear=False).count("[/bold] [red]x\\x1b]0;pwned\\x07") == 3


def on_a_terminal(command, **environment):
    """Returns the output of a command on a terminal."""
    primary, secondary = pty.openpty()
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "200", **environment}
    process = subprocess.Popen(command, stdout=secondary, stderr=secondary, stdin=subprocess.DEVNULL, env=variables)
    os.close(secondary)
    shown = b""
    with contextlib.suppress(OSError):  # no process has the terminal open any more
        while part := os.read(primary, 65536):
            shown += part
    os.close(primary)
    assert process.wait(60) == 0, shown
    return shown.decode()


@pytest.fixture(scope="module")
def hostile(trained, tmp_path_factory):
    """Copies the run of the other tests, with control characters in its symbols, recipe and stage."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(trained, folder)
    for path in folder.glob("checkpoints/*/sidecar/data.json"):
        metadata = json.loads(json.loads(path.read_text())["body"])
        metadata["config"]["name"] = metadata["extra"]["stage"] = f"a[/b]{TITLE}"
        body = json.dumps(metadata)
        path.write_text(json.dumps({"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}))
    return folder


def test_generated_text_and_names_never_steer_a_terminal():
    program = textwrap.dedent("""
        import os, types
        from looplm_jax.cli import generate
        from looplm_jax.inference import Finish, NewToken, Result

        def new(text):
            return NewToken(token=0, text=text, exit_loop=1, log_prob=0.0, previews=())

        loaded = types.SimpleNamespace(
            need_tokenizer=lambda: None, model=types.SimpleNamespace(config=types.SimpleNamespace(loops=2))
        )
        options = types.SimpleNamespace(json=False, prompt=["a", "b"], exit="q=0.5")
        result = Result(
            prompt_ids=(0,), tokens=(0, 0, 0), exit_loops=(1, 1, 1), log_probs=(0.0,) * 3,
            text="\\x1b]0;pwned\\x07 [/b]\\x9b", finish=Finish.STOP, error=None,
        )
        for environment in ({}, {"NO_COLOR": "1"}):
            os.environ.update(environment)
            view = generate._view(options, loaded, "prompt \\x1b]0;pwned\\x07")
            for text in ("\\x1b", "]0;pwned", "\\x07 [/b]"):
                view.show(new(text))
            view.finish(result, None)
    """)
    shown = on_a_terminal([sys.executable, "-c", program])
    assert "\x1b]0" not in shown
    assert "\x07" not in shown
    assert "\x9b" not in shown
    assert shown.count(r"prompt \x1b]0;pwned\x07") == 2


def test_a_hostile_checkpoint_is_inspected_safely(hostile, capsys):
    assert main(["inspect", str(hostile)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"recipe a[/b]\x1b]0;pwned\x07: " in shown
    assert r"a[/b]\x1b]0;pwned\x07" in shown.partition("recipe")[0]
