"""The experiment looprpt: its grid and its report; slow: a complete run at smoke scale."""

import io
import json

import pytest
from rich.console import Console
from text_fixtures import with_documents

from experiments import looprpt
from experiments.__main__ import main
from experiments.command import EXPERIMENTS
from experiments.frame import Record, Scale
from experiments.looprpt import EQ4, LOOPRPT, LOOPRPT_ARM
from experiments.text_models import TextModel, TextModels

# Grids


def test_every_scale_has_cells_of_their_own_names_whose_settings_are_plain():
    assert EXPERIMENTS[LOOPRPT.name] is LOOPRPT
    for scale in LOOPRPT.scales:
        cells = LOOPRPT.cells(scale)
        assert len({cell.name for cell in cells}) == len(cells) > 0
        for cell in cells:
            assert cell.name.replace("-", "").replace("_", "").isalnum()
            assert json.loads(json.dumps(cell.settings)) == cell.settings


@pytest.mark.parametrize("scale", LOOPRPT.scales, ids=lambda scale: scale.value)
def test_every_arm_of_looprpt_starts_from_the_base_and_has_its_steps(scale, tmp_path):
    models = TextModels(folder=with_documents(tmp_path) / "text-models", console=Console(file=io.StringIO()))
    cells = LOOPRPT.cells(scale)
    steps = {}
    for cell in cells:
        # A checkpoint brings its own tokenizer, so none is trained.
        model = TextModel(**{**cell.settings["model"], "checkpoint": "elsewhere"})
        recipe = looprpt._recipe(cell, models, model, tmp_path / "base")
        (stage,) = recipe.stages
        assert recipe.start.checkpoint == str(tmp_path / "base")
        assert recipe.data.seed == model.seed + 1000
        assert stage.loops == recipe.model.loops
        steps[cell.settings["arm"]] = stage.steps
    if scale is not Scale.SMOKE:
        rollouts = {Scale.CPU: 4, Scale.GPU: 8}[scale]
        assert steps.pop("Eq. 4, equal compute") == round(steps[EQ4] * (4 + 3 * rollouts) / 3)
        assert len(steps) == 9
    assert len(set(steps.values())) == 1


# Reports


def record(result):
    return Record(cell=str(result), settings={}, result=result, seconds=1.0, versions={})


def looprpt_record(arm, after, loops):
    """Returns a record of two loops whose accuracies after training are `after`, from a base of 0.5 at 2 loops."""

    def bucket(share, at):
        return {"tokens": 10, "accuracy": [share, share], "adaptive": share, "loops": at}

    names = ("all", "easy", "medium", "hard")
    return record(
        {
            "arm": arm,
            "steps": 7,
            "loops": 2,
            "before": dict.fromkeys(names, bucket(0.5, 2.0)),
            "after": dict.fromkeys(names, bucket(after, loops)),
        }
    )


def test_looprpt_reports_the_base_and_the_changes_from_it_beside_the_printed_numbers(tmp_path):
    report = LOOPRPT.report(
        [
            looprpt_record(EQ4, 0.5, 2.0),
            looprpt_record(LOOPRPT_ARM, 0.75, 1.5),
            looprpt_record(LOOPRPT_ARM, 0.625, 1.0),
        ]
    )
    everywhere, *_, hard = report.tables
    assert everywhere.rows[0] == ["base", "", "", "50.00", "50.00", "50.00", "2.00"]
    accuracy = "+18.75 (+12.50 to +25.00)"
    assert everywhere.rows[2] == ["LoopRPT", "7", "2", accuracy, accuracy, accuracy, "-0.75 (-1.00 to -0.50)"]
    assert hard.rows[-1][-3:] == ["38.10", "37.24", "2.28"]
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    assert report.findings[0].startswith(
        "LoopRPT minus Eq. 4, all tokens, seed by seed: accuracy at loop 1 +25.00, at the last loop +25.00"
    )
    report.figures["looprpt.png"](tmp_path / "looprpt.png")
    assert (tmp_path / "looprpt.png").stat().st_size > 0


def test_a_bucket_without_tokens_has_no_numbers():
    everywhere, *_ = LOOPRPT.report([looprpt_record(EQ4, float("nan"), float("nan"))]).tables
    assert everywhere.rows[1][3:] == ["-"] * 4


# A complete run


@pytest.mark.slow
def test_looprpt_measures_every_bucket_before_and_after(tmp_path):
    assert main(["looprpt", "--root", str(with_documents(tmp_path))]) == 0
    folder = tmp_path / "looprpt" / "smoke"
    (found,) = json.loads((folder / "results.json").read_text())["records"]
    result, report = found["result"], (folder / "report.md").read_text()
    assert result["before"].keys() == result["after"].keys() == {"all", "easy", "medium", "hard"}
    for bucket, own in result["after"].items():
        assert own["tokens"] == result["before"][bucket]["tokens"]
        assert len(own["accuracy"]) == result["loops"] == 4
    assert result["after"]["all"]["loss"] != result["before"]["all"]["loss"]
    assert "38.10" in report
