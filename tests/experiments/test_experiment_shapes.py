"""Experiments over layers and loops: the smallest cell of each grid runs, and reports match the records."""

import json

import pytest

from experiments.__main__ import main
from experiments.frame import Record, Scale
from experiments.registry import EXPERIMENTS
from experiments.task_grid import TaskRun, shape_table
from experiments.three_hop import THREE_HOP
from looplm_jax.config import OptimizerConfig, OptimizerKind
from looplm_jax.data.tasks import make_task


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tests"), [("addition", 1), ("p-hop", 2), ("three-hop", 1)])
def test_it_runs_at_smoke_scale(name, tests, monkeypatch, tmp_path):
    experiment = EXPERIMENTS[name]
    last = experiment.cells(Scale.SMOKE)[-1:]
    monkeypatch.setattr(type(experiment), "cells", lambda *_: last)
    assert main([name, "--root", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / name / "smoke" / "results.json").read_text())["records"]
    result = record["result"]
    assert result["shape"] == "1⊗2"
    assert len(result["accuracy"]) == tests
    assert all(len(values) == 4 for values in result["accuracy"].values())
    assert all(0 < share < 1 for share in result["commonest"].values())
    assert result["tokens_per_second"] > 0
    assert 0 < result["share_in_steps"] < 1
    report = (tmp_path / name / "smoke" / "report.md").read_text()
    assert "1⊗2" in report
    for figure in report.split("![")[1:]:
        assert (tmp_path / name / "smoke" / figure.partition("]")[0]).exists()


@pytest.mark.parametrize("name", ["mano", "addition", "p-hop", "three-hop"])
def test_every_grid_is_of_tasks_that_exist_and_rows_that_hold_their_problems(name):
    experiment = EXPERIMENTS[name]
    for scale in experiment.scales:
        cells = experiment.cells(scale)
        assert len({cell.name for cell in cells}) == len(cells) > 0
        for cell in cells:
            train = make_task(cell.settings["task"])
            for spec in cell.settings["tests"].values():
                assert make_task(spec).tokenizer.serialize() == train.tokenizer.serialize()
            assert train.max_tokens <= cell.settings["sequence_length"]


@pytest.mark.parametrize(("name", "rate"), [("addition", 5e-3), ("p-hop", 1e-3)])
def test_the_published_runs_use_the_published_optimizer(name, rate):
    recipes = [TaskRun(**cell.settings).recipe() for cell in EXPERIMENTS[name].cells(Scale.PAPER)]
    assert {recipe.optimizer for recipe in recipes} == {OptimizerConfig(kind=OptimizerKind.ADAFACTOR, weight_decay=0.0)}
    assert {recipe.stages[0].learning_rate for recipe in recipes} == {rate}


def record(shape, accuracy, questions=100, commonest=0.25):
    settings = {"task": f"threehop:questions={questions},people=6,relations=5,validation_items=9"}
    result = {
        "shape": shape,
        "at_trained_depth": {"others": accuracy},
        "commonest": {"others": commonest},
        "parameters": 1000,
        "curve": [[1, 2.0]],
    }
    return Record(cell="a", settings=settings, result=result, seconds=1.0, versions={})


def test_a_table_says_best_mean_range_printed_and_what_a_constant_gets():
    records = [record("1⊗1", 0.25), record("1⊗1", 0.75), record("1⊗2", 1.0)]
    table = shape_table(records, {"others": "o"}, {"1⊗2": {"others": 98.1}}, "t")
    assert table.rows == [
        ["1⊗1", "1,000", "2", "75.0", "50.0 (25.0 to 75.0)", ""],
        ["1⊗2", "1,000", "1", "100.0", "100.0 (100.0 to 100.0)", "98.1"],
        ["commonest answer", "", "", "25.0", "", ""],
    ]


def test_three_hop_says_from_how_many_questions_on_a_shape_gets_it():
    records = [
        record("6⊗1", 0.5, 400),
        record("6⊗4", 0.2, 100),
        record("6⊗4", 0.95, 200),
        record("6⊗4", 0.89, 200),
        record("6⊗4", 1.0, 400),
    ]
    report = THREE_HOP.report(records)
    assert report.findings == [
        "6⊗1 gets 90% right with none of these numbers of questions; at most 50.0%.",
        "6⊗4 gets 90% right on average from 200 questions on.",
    ]
    (table,) = report.tables
    assert list(table.columns) == ["layers ⊗ loops", "100", "200", "400"]
    assert table.rows[0] == ["6⊗1", "", "", "50.0 (50.0 to 50.0)"]
