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


def test_buckets_are_printed_and_written(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), "--sequences", "4", "--buckets", "base", "--out", str(tmp_path / "o")]) == 0
    assert "mean loops" in capsys.readouterr().out
    values = json.loads((tmp_path / "o" / "buckets.json").read_text())
    assert [own["name"] for own in values["buckets"]] == ["easy", "medium", "hard"]
    assert values["base"] == "base"


def test_problems_are_answered_at_every_depth(tmp_path, capsys):
    arguments = ["evaluate", str(tmp_path), "--problems", TASK, "--limit", "3", "--max-new-tokens", "2"]
    for rule in (["--depth-sweep", "--max-loops", "3"], ["--exit", "sampled"]):
        assert main([*arguments, *rule, "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert "mean loops" in printed
    values = json.loads((tmp_path / "o" / "problems.json").read_text())
    assert list(values["scores"]) == ["loops=1", "loops=2", "loops=3"]
    assert [own["mean_loops"] for own in values["scores"].values()] == [1, 2, 3]
    answers = values["answers"]["loops=2"]
    assert len(answers) == values["scores"]["loops=2"]["problems"] == 3
    assert all(own["answer"] and own["reward"] in (0, 1) for own in answers)
    sampled = json.loads((tmp_path / "o" / "problems-2.json").read_text())
    assert list(sampled["scores"]) == ["sampled"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "exact"], "--reward is for problems: give --problems too"),
        (["--problems", "x", "--tasks", "y"], "--tasks and --problems are two evaluations; leave one out"),
        (["--problems", "x", "--sequences", "4"], "--sequences is for held-out documents: leave it or --problems out"),
        (["--problems", "x", "--batch-size", "4"], "--batch-size is for tasks: give --tasks too"),
        (["--problems", "x", "--max-loops", "4"], "--max-loops is for --depth-sweep here"),
        (["--problems", "missing.jsonl"], "missing.jsonl"),
        (["--problems", TASK, "--max-new-tokens", "5000"], "problem 1: the prompt has"),
    ],
)
def test_mistakes_about_problems_end_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "run", *arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert message in last
    assert list(tmp_path.iterdir()) == []
