import json
import sys

import pytest
from evaluation_cases import TASK

from looplm_jax.cli import evaluation_session, generation_session
from looplm_jax.cli.generation_views import loop_colour
from looplm_jax.cli.main import main
from looplm_jax.loading import load


@pytest.fixture(autouse=True)
def checkpoint(loaded, monkeypatch):
    """Any path but `none` is a checkpoint of the tiny model."""

    def load_tiny(path, *, step=None):
        return load(path, step=step) if path == "none" else loaded

    for session in (evaluation_session, generation_session):
        monkeypatch.setattr(session, "load", load_tiny)


@pytest.fixture
def prompt(loaded):
    return loaded.tokenizer.decode([1, 2, 3])


def test_evaluate_writes_what_it_prints(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["evaluate", str(run / "checkpoints" / "7"), "--sequences", "6", "--max-loops", "4"]) == 0
    out = run / "evaluation" / "step_7"
    printed = capsys.readouterr()
    assert "trained" in printed.out
    assert "q=0.5" in printed.out
    assert "next: looplm generate" in printed.out
    assert "step 9 is bad" in printed.err
    values = json.loads((out / "evaluation.json").read_text())
    assert values["depths"]["loops"] == [1, 2, 3, 4]
    assert (values["step"], values["sequences"]) == (7, 6)
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "depth.png", "exit.png"}


def test_evaluate_without_matplotlib_writes_the_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--sequences", "4", "--max-loops", "4", "--data", TASK, "--validation-fraction", "0.5"]
    assert main(["evaluate", str(tmp_path), *arguments, "--out", str(tmp_path / "here")]) == 0
    assert "pip install 'looplm_jax[plot]'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["evaluation.json"]


def test_generate_plain(prompt, capsys):
    assert main(["generate", "run", "--prompt", prompt, "--max-new-tokens", "9", "--exit", "loops=2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    counts = printed[-3].removeprefix("loops per token: ")
    assert set(counts) == {"2"}
    assert f"{len(counts)} tokens, 2.00 loops per token on average" in printed[-2]
    assert printed[-1] == f"next: looplm generate run --prompt '{prompt}' --exit q=0.5"


def test_generate_json(prompt, loaded, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text(prompt)
    assert main(["generate", "run", "--prompt-file", str(file), "--json", "--temperature", "1", "--seed", "5"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["pieces"] == [loaded.tokenizer.piece(token) for token in values["tokens"]]
    assert values["text"] == loaded.tokenizer.decode(values["tokens"])
    assert set(values["exit_loops"]) <= {1, 2, 3}
    assert values["prompt_tokens"] == 4


def test_generate_in_colour(prompt, capsys, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert main(["generate", "run", "--prompt", prompt, "--max-new-tokens", "4", "--exit", "q=0.5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("loops:")
    assert "\x1b[38;2;" in printed
    assert "loops per token on average" in printed


def test_colours_tell_depths_apart():
    for loops in (1, 2, 4, 8):
        assert len({loop_colour(loop, loops) for loop in range(1, loops + 1)}) == loops


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "run", "--prompt", "1", "--exit", "q=1.5"], "q must be in [0, 1], not 1.5"),
        (["generate", "run", "--prompt", "1", "--exit", "loops=0"], "loops must be at least 1, not 0"),
        (["generate", "run", "--prompt", "1", "--temperature", "-1"], "temperature must not be negative, not -1.0"),
        (["generate", "run", "--prompt", ""], "the prompt is empty; give --prompt TEXT or --prompt-file FILE"),
        (["generate", "run"], "the prompt is empty; give --prompt TEXT or --prompt-file FILE"),
        (["generate", "run", "--prompt", "1 " * 200], "201 tokens of prompt and 128 new ones are beyond"),
        (["generate", "run", "--prompt", "1", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, not 0"),
        (["generate", "none", "--prompt", "1"], "none is not a checkpoint"),
        (["generate", "run", "--prompt-file", "missing.txt"], "missing.txt: No such file or directory"),
        (["evaluate", "none"], "none is not a checkpoint"),
        (["evaluate", "run", "--max-loops", "0"], "--max-loops must be at least 1, not 0"),
        (["evaluate", "run", "--sequences", "-2"], "--sequences must be at least 1, not -2"),
        (["evaluate", "gs://bucket/run"], "say with --out where to write the evaluation of gs://bucket/run"),
        (["evaluate", "run", "--data", "missing/*.txt"], "missing/*.txt"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    *_, last = printed.err.splitlines()
    assert message in last
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_file_that_is_not_text(tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert main(["generate", "run", "--prompt-file", str(tmp_path / "prompt")]) == 2
    assert "is not UTF-8 text; convert it" in capsys.readouterr().err
