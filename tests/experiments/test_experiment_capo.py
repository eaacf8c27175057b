"""The Capo experiment by its command, and its report."""

import json

import pytest

from experiments.__main__ import main
from experiments.capo import CAPO, CapoRun
from experiments.capo_report import capo_report
from experiments.frame import Record, Scale


def record(loops, bits, seed=0, people=100):
    result = {
        "shape": f"2⊗{loops}",
        "people": people,
        "parameters": 1000,
        "exposures": 99.6,
        "bits": [bits / 2] * (loops - 1) + [bits] + [0.0] * loops,
        "at_trained_depth": bits,
        "most": 6.5,
        "name": [5.0] * 2 * loops,
        "value": [1.0] * 2 * loops,
        "curve": [[50.0, bits / 2], [99.6, bits]],
    }
    return Record(cell=f"{loops}-{seed}-{people}", settings={}, result=result, seconds=1.0, versions={})


@pytest.mark.parametrize(("people", "exposures"), [(100, 10), (1000, 3)])
def test_a_run_is_as_long_as_its_exposures(people, exposures):
    settings = {**CAPO.cells(Scale.SMOKE)[0].settings, "people": people, "exposures": exposures}
    run = CapoRun(**settings)
    (stage,) = run.recipe().stages
    positions = stage.steps * stage.batch_size * stage.sequence_length
    assert run.exposures_of(positions) == pytest.approx(exposures, rel=0.1)


@pytest.mark.parametrize("scale", CAPO.scales)
def test_plain_and_looped_differ_in_loops_and_where_it_must_be_in_learning_rate(scale):
    cells = CAPO.cells(scale)
    assert len({cell.name for cell in cells}) == len(cells)
    for plain, looped in zip(cells[::2], cells[1::2], strict=True):
        assert (plain.settings["loops"], looped.settings["loops"]) == (1, 4)
        rates = {"learning_rate": 5e-3} if scale is Scale.CPU else {}  # the plain model's rate is too high for loops
        assert {**plain.settings, "loops": 4, **rates} == looped.settings


def test_the_report_compares_what_differs_in_loops_alone():
    records = [record(1, 1.0), record(1, 1.2, seed=1), record(4, 1.21), record(4, 2.0, people=200)]
    report = capo_report(records)
    (finding,) = report.findings
    assert finding.startswith("2⊗4 against 2⊗1 at 1,000 parameters, 100 people and 100 exposures: 1.210 against 1.100")
    assert "+10.0%" in finding
    capacity, depths, exposures = report.tables
    assert capacity.rows[0][5] == "1.100 (1.000 to 1.200)"
    assert depths.rows[1][2:] == ["0.605"] * 3 + ["1.210"] + ["0.000"] * 4
    assert exposures.rows[0][2:] == ["50: 0.50", "100: 1.00"]


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name, draw in capo_report([record(1, 1.0), record(4, 1.1), record(4, 1.2, seed=1)]).figures.items():
        draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_capo_runs_at_smoke_scale(capsys, tmp_path):
    assert main(["capo", "--root", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "capo" / "smoke" / "results.json").read_text())["records"]
    plain, looped = (record["result"] for record in records)
    assert plain["parameters"] == looped["parameters"]
    assert (len(plain["bits"]), len(looped["bits"])) == (2, 8)
    for result in (plain, looped):
        assert result["at_trained_depth"] < result["most"]
        assert result["exposures"] == pytest.approx(2, rel=0.25)
        assert result["curve"][-1][1] == pytest.approx(result["at_trained_depth"], rel=1e-4)
        assert 0 < result["share_in_steps"] < 1
    assert "bits a parameter" in capsys.readouterr().out
