"""Experiment grids: finished cells are not run again, results of other settings are refused, and work is divided."""

import json
import signal
import subprocess
import sys

import pytest
from processes import running
from rich.console import Console

from experiments import command
from experiments.__main__ import main
from experiments.frame import Cell, Grid, Record, Report, Scale, Share
from experiments.registry import EXPERIMENTS
from looplm_jax.errors import UserError
from looplm_jax.training._stopping import Stopped

CELLS = tuple(Cell(name=f"cell-{number}", settings={"number": number, "list": [1, 2]}) for number in range(5))


@pytest.fixture
def grid(tmp_path):
    grid = Grid(folder=tmp_path / "grid", experiment="counting", scale="smoke")
    grid.open()
    return grid


def counting(done, stop_at=None):
    """Returns work that records the cells it ran."""

    def work(cell, folder):
        assert folder.is_dir()
        if cell.settings["number"] == stop_at:
            raise Stopped(signal.SIGTERM)
        done.append(cell.settings["number"])
        return {"square": cell.settings["number"] ** 2}

    return work


def test_finished_cells_are_not_run_again_and_an_interrupted_grid_goes_on(grid):
    done, said = [], []
    with pytest.raises(Stopped):
        grid.run(CELLS, counting(done, stop_at=2), Share(), said.append)
    assert [record.cell for record in grid.records(CELLS)] == ["cell-0", "cell-1"]
    records = grid.run(CELLS, counting(done), Share(), said.append).records
    assert done == [0, 1, 2, 3, 4]
    assert [record.result["square"] for record in records] == [0, 1, 4, 9, 16]
    assert "cell 1 of 5, cell-0: finished before" in said


def test_a_cell_that_fails_does_not_hold_up_the_others(grid):
    def work(cell, folder):
        if cell.settings["number"] in (1, 3):
            raise UserError(f"no {cell.name}")
        return {}

    said = []
    outcome = grid.run(CELLS, work, Share(), said.append)
    assert [record.cell for record in outcome.records] == ["cell-0", "cell-2", "cell-4"]
    assert outcome.failed == {"cell-1": "no cell-1", "cell-3": "no cell-3"}
    assert "cell 2 of 5, cell-1: FAILED: no cell-1" in said
    assert not grid.run(CELLS, counting([]), Share(), said.append).failed


def test_the_time_before_an_interruption_counts(grid):
    folder = grid.cell_folder(CELLS[0])
    folder.mkdir(parents=True)
    (folder / "interrupted.json").write_text(json.dumps({"seconds": 1000.0}))
    (record,) = grid.run(CELLS[:1], counting([]), Share(), lambda _: None).records
    assert 1000 < record.seconds < 1100


def test_shares_together_are_the_grid_and_no_cell_twice(grid):
    done = []
    for part in (1, 2, 3):
        grid.run(CELLS, counting(done), Share.parse(f"{part}/3"), lambda _: None)
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert len(grid.records(CELLS)) == 5


def test_a_record_says_what_it_was_made_with(grid):
    (record,) = grid.run(CELLS[3:4], counting([]), Share(), lambda _: None).records
    assert record.settings == {"number": 3, "list": [1, 2]}
    assert {"jax", "looplm_jax", "python"} <= record.versions.keys()


def test_records_of_other_settings_are_refused_before_anything_runs(grid):
    grid.run(CELLS, counting([]), Share(), lambda _: None)
    changed, done = Cell(name="cell-4", settings={"number": 9, "list": [1, 2]}), []
    with pytest.raises(UserError, match=r"record\.json was made with other settings \(number\); choose another --out"):
        grid.run((*CELLS[:4], changed), counting(done), Share(), lambda _: None)
    assert not done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": "mano"}, "holds other results (experiment is 'counting', not 'mano')"),
        ({"scale": "cpu"}, "holds other results (scale is 'smoke', not 'cpu')"),
    ],
)
def test_a_folder_of_another_experiment_is_refused(grid, changes, message):
    other = Grid(**{"folder": grid.folder, "experiment": "counting", "scale": "smoke", **changes})
    with pytest.raises(UserError) as refused:
        other.open()
    assert message in str(refused.value)


def test_a_folder_of_another_version_is_refused(grid):
    path = grid.folder / "grid.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    with pytest.raises(UserError, match=r"format is 0, not 1"):
        grid.open()


def test_a_broken_record_is_named(grid):
    grid.run(CELLS[:1], counting([]), Share(), lambda _: None)
    (grid.cell_folder(CELLS[0]) / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"record\.json is not JSON; remove it"):
        grid.records(CELLS[:1])


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match="write it as PART/OF"):
        Share.parse(share)


class Failing:
    """An experiment of two cells, one of which fails."""

    name, claim, scales = "failing", "nothing", (Scale.SMOKE,)

    def cells(self, scale):
        return CELLS[:2]

    def run(self, cell, folder, console):
        if cell is CELLS[1]:
            raise UserError("gave up at step 7")
        return {}

    def report(self, records):
        return Report(tables=(), findings=(f"{len(records)} finished",), figures={})


def test_a_grid_with_a_cell_that_failed_reports_the_others_and_ends_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "EXPERIMENTS", {"failing": Failing()})
    assert main(["failing", "--root", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == (
        "looplm: not finished: cell-1 (gave up at step 7); fix that and run the same command again; "
        "finished cells are kept"
    )
    assert "1 finished" in (tmp_path / "failing" / "smoke" / "report.md").read_text()


class Empty:
    """An experiment without cells."""

    name, claim, scales = "empty", "nothing", (Scale.SMOKE,)

    def cells(self, scale):
        return ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["manno"], "no such experiment 'manno'; did you mean 'mano'"),
        (["mano", "--scale", "smok"], "mano has no scale 'smok'; did you mean 'smoke'"),
        (["mano", "--share", "2"], "--share 2: write it as PART/OF"),
        (["empty"], "empty has no cells at --scale smoke"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "EXPERIMENTS", {**EXPERIMENTS, "empty": Empty()})
    assert main([*arguments, "--root", str(tmp_path / "root")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "root").exists()


def test_every_experiment_is_listed_with_its_scales(capsys, tmp_path):
    assert main(["list", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in EXPERIMENTS)
    assert "0 of 2" in printed


def test_a_report_without_results_says_what_to_type(capsys, tmp_path):
    assert main(["report", "--root", str(tmp_path)]) == 0
    assert "next: python -m experiments mano" in capsys.readouterr().out


def stopped_in_the_second_cell(arguments):
    """Returns a separate process and its output."""
    command = [sys.executable, "-m", "experiments", *arguments]
    said = []
    with running(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            said.append(line)
            if "compiling" in line and any("cell 2 of 2" in earlier for earlier in said):
                process.send_signal(signal.SIGTERM)
    return process.returncode, "".join(said)


@pytest.mark.slow
def test_mano_is_stopped_while_it_compiles_goes_on_and_then_does_nothing(capsys, tmp_path):
    arguments = ["mano", "--root", str(tmp_path)]
    status, said = stopped_in_the_second_cell(arguments)
    assert status == 128 + signal.SIGTERM
    assert said.endswith("looplm: stopped by SIGTERM; the same command resumes there\n")
    assert main(arguments) == 0
    assert "cell 1 of 2, L2-1x1-lr0.001-seed0: finished before" in capsys.readouterr().err
    folder = tmp_path / "mano" / "smoke"
    records = json.loads((folder / "results.json").read_text())["records"]
    assert [record["result"]["shape"] for record in records] == ["1⊗1", "1⊗2"]
    assert len({record["result"]["parameters"] for record in records}) == 1
    assert all(
        len(record["result"]["accuracy"]["L=2"]) == 2 * loops for record, loops in zip(records, (1, 2), strict=True)
    )
    report = (folder / "report.md").read_text()
    assert "1⊗2" in report
    assert main(arguments) == 0
    assert "finished before" in capsys.readouterr().err
    assert main(["report", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "mano, smoke: 2 of 2 cells" in shown
    assert "commonest answer" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "results.json is not a file of results"),
        ('{"experiment": "mano"}', "results.json is not a file of results"),
        ("[]", "results.json is not a file of results"),
        ('{"format": 0}', "results.json is of version 0, and this is 1"),
        (
            '{"format": 1, "experiment": "none", "scale": "cpu", "cells": 1, "records": []}',
            "results.json: no such experiment 'none'; remove the file",
        ),
    ],
)
def test_results_that_cannot_be_read_are_named_in_one_line(content, message, capsys, tmp_path):
    path = tmp_path / "mano" / "cpu" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert main(["report", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_results_are_written_where_a_share_is_all_there_is(tmp_path):
    class Squares(Empty):
        def report(self, records):
            return Report(tables=(), findings=(f"{len(records)} cells",), figures={})

    from experiments.reporting import write_results

    record = Record(cell="a", settings={}, result={}, seconds=1.0, versions={"jax": "1"})
    console = Console(file=None, quiet=True)
    assert write_results(tmp_path, Squares(), Scale.SMOKE, [record], 3, console) == ["results.json", "report.md"]
    assert "1 of 3 cells" in (tmp_path / "report.md").read_text()
