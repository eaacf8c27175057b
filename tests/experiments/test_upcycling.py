"""The complete upcycling experiment at a small size, and resuming it."""

import json

import pytest
from text_fixtures import RESULTS, with_documents

from experiments import text_models, upcycling
from experiments.__main__ import main
from experiments.frame import Record, Scale
from experiments.reporting import read_results
from experiments.upcycling import UPCYCLING
from looplm_jax.convert._upcycle import Order


def run_smoke(root):
    """Runs the experiment below a root with a few existing documents. Returns the folder of its results."""
    assert main(["upcycling", "--root", str(with_documents(root))]) == 0
    return root / "upcycling" / "smoke"


def results_in(folder):
    return [record["result"] for record in json.loads((folder / "results.json").read_text())["records"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder with all variants measured."""
    return run_smoke(tmp_path_factory.mktemp("experiments"))


@pytest.mark.slow
def test_both_orders_are_measured_trained_and_measured(tmp_path, monkeypatch):
    variants = [upcycling.Variant(order=order.value, optimizer=True) for order in Order]
    monkeypatch.setattr(upcycling, "VARIANTS", variants)
    courses = results_in(run_smoke(tmp_path))
    assert [course["variant"] for course in courses] == ["interleave", "stack"]
    for course in courses:
        assert course["steps"] == [0, 2, 4]
        assert [len(losses) for losses in course["loss_per_loop"]] == [4, 4, 4]


@pytest.mark.slow
def test_every_variant_is_measured_from_its_start_to_its_end(folder):
    courses = {course["variant"]: course for course in results_in(folder)}
    assert list(courses) == [
        "base", "interleave", "stack",
        "base-fresh-optimizer", "interleave-fresh-optimizer", "stack-fresh-optimizer",
    ]  # fmt: skip
    assert all(course["steps"] == [0, 2, 4] for course in courses.values())
    assert all([len(losses) for losses in course["loss_per_loop"]] == [4, 4, 4] for course in courses.values())
    losses = {name: course["expected_loss"] for name, course in courses.items()}
    for name in ("base", "interleave", "stack"):  # the first measurement does not depend on the optimizer state
        assert losses[name][0] == losses[f"{name}-fresh-optimizer"][0]
        assert losses[name][2] != losses[f"{name}-fresh-optimizer"][2]
    assert losses["interleave"][0] != losses["stack"][0] != losses["base"][0]


@pytest.mark.slow
def test_the_base_resumes_from_its_last_parameters(folder):
    course = results_in(folder)[0]
    metrics = folder / "shared" / "base-seed0" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    ended = [row["loss_per_loop"] for row in rows if row["kind"] == "evaluation"][-1]
    assert course["loss_per_loop"][0] == pytest.approx(ended, rel=1e-5)


@pytest.mark.slow
def test_the_report_shows_what_was_measured(folder):
    report = (folder / "report.md").read_text()
    courses = results_in(folder)
    for measured in (courses[1]["expected_loss"][0], courses[2]["loss_per_loop"][2][3]):
        assert f"{measured:.3f}" in report
    assert "interleave minus stack, seed by seed" in report
    assert (folder / "upcycling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_is_done_is_not_done_again(folder, monkeypatch, capsys):
    before = (folder / "results.json").read_bytes()
    for name in ("train_and_evaluate", "trained", "upcycle"):
        monkeypatch.delattr(upcycling, name)
    for name in ("train", "load", "collect_stdlib"):
        monkeypatch.delattr(text_models, name)
    assert main(["upcycling", "--root", str(folder.parent.parent)]) == 0
    assert (folder / "results.json").read_bytes() == before
    assert capsys.readouterr().out.endswith("next: python -m experiments report\n")


@pytest.mark.slow
def test_an_unfinished_cell_finds_its_runs_trained(folder):
    before = results_in(folder)
    metrics = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    assert len(metrics) == 7
    (folder / "cells" / "stack-seed0" / "record.json").unlink()
    assert main(["upcycling", "--root", str(folder.parent.parent)]) == 0
    assert results_in(folder) == before
    assert metrics == {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}


def record(variant, seed, losses):
    """Returns a record with one loop and these expected losses at steps 0 and 5."""
    result = {
        "seed": seed,
        "variant": variant,
        "steps": [0, 5],
        "loss_per_loop": [[loss] for loss in losses],
        "expected_loss": losses,
    }
    settings = UPCYCLING.cells(Scale.SMOKE)[0].settings
    return Record(cell=f"{variant}-seed{seed}", settings=settings, result=result, seconds=1.0, versions={})


def test_part_of_the_grid_has_a_report_and_orders_are_compared_where_a_seed_has_both():
    some = [record("base", 0, [4.0, 3.0]), record("stack", 0, [4.25, 3.0])]
    report = UPCYCLING.report(some)
    assert report.tables[0].rows == [["base", "4.000", "3.000", "1"], ["stack", "4.250", "3.000", "1"]]
    assert len(report.findings) == 1
    more = [*some, record("interleave", 0, [4.5, 2.75]), record("interleave", 1, [5.5, 9.75])]
    report = UPCYCLING.report(more)
    assert report.tables[0].rows[-1] == ["interleave", "5.000", "6.250", "2"]
    assert report.findings[1].startswith("Expected loss, interleave minus stack, seed by seed: +0.250 just after")
    assert "-0.250 after 5 steps" in report.findings[1]


def test_the_records_in_the_repository_are_those_of_the_grid():
    results = read_results(RESULTS / "upcycling" / "cpu" / "results.json")
    cells = {cell.name: json.loads(json.dumps(cell.settings)) for cell in UPCYCLING.cells(Scale.CPU)}
    assert {record.cell: record.settings for record in results.records} == cells
    report = UPCYCLING.report(results.records)
    assert report.tables[0].rows[2] == ["stack", "4.240", "4.119", "4.076", "4.082", "4.072", "2"]
    assert "+0.035, +0.049 just after upcycling; -0.009, +0.007 after 200 steps" in report.findings[1]
