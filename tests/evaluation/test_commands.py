import json
import sys

import pytest
from evaluation_cases import TASK

from looplm_jax.cli import evaluate
from looplm_jax.cli.main import main
from looplm_jax.evaluation._reports import write_run_report
from looplm_jax.loading import load
from looplm_jax.recipes import named_recipe


@pytest.fixture(autouse=True)
def checkpoint(loaded, monkeypatch):
    """Makes every path except `none` a checkpoint of the tiny model."""

    def load_tiny(path, *, step, dtype):
        return load(path, step=step, dtype=dtype) if path == "none" else loaded

    monkeypatch.setattr(evaluate, "load", load_tiny)


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


def test_the_report_of_a_run_without_matplotlib_says_how_to_get_a_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_run_report(tmp_path, named_recipe("mano-small")) == ["report.md"]
    wanted = "There is no figure: figures need matplotlib; pip install 'looplm_jax[plot]'."
    assert wanted in (tmp_path / "report.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
