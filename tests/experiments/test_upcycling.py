"""The complete upcycling experiment at a small size, and resuming it."""

import json
from pathlib import Path

import pytest

from experiments import upcycling
from looplm_jax.convert._upcycle import Order


def run_smoke(out):
    """Runs the experiment in a folder with an existing small corpus."""
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    lines = [{"text": part} for path in sources for part in path.read_text().split("\n\n") if part.strip()]
    (out / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert upcycling.main(["--out", str(out), "--scale", "smoke"]) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder with all variants measured."""
    return run_smoke(tmp_path_factory.mktemp("upcycling"))


@pytest.mark.slow
def test_both_orders_are_measured_trained_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(upcycling, "VARIANTS", [upcycling.Variant(order=order, optimizer=True) for order in Order])
    courses = json.loads((run_smoke(tmp_path) / "results.json").read_text())["courses"]
    assert [course["variant"] for course in courses] == ["interleave", "stack"]
    for course in courses:
        assert course["steps"] == [0, 2, 4]
        assert [len(losses) for losses in course["loss_per_loop"]] == [4, 4, 4]


@pytest.mark.slow
def test_every_variant_is_measured_from_its_start_to_its_end(folder):
    results = json.loads((folder / "results.json").read_text())
    names = [course["variant"] for course in results["courses"]]
    assert names == [
        "base", "interleave", "stack",
        "base-fresh-optimizer", "interleave-fresh-optimizer", "stack-fresh-optimizer",
    ]  # fmt: skip
    courses = {course["variant"]: course for course in results["courses"]}
    assert all(course["steps"] == [0, 2, 4] for course in courses.values())
    assert all([len(losses) for losses in course["loss_per_loop"]] == [4, 4, 4] for course in courses.values())
    losses = {name: course["expected_loss"] for name, course in courses.items()}
    for name in ("base", "interleave", "stack"):  # the first measurement does not depend on the optimizer state
        assert losses[name][0] == losses[f"{name}-fresh-optimizer"][0]
        assert losses[name][2] != losses[f"{name}-fresh-optimizer"][2]
    assert losses["interleave"][0] != losses["stack"][0] != losses["base"][0]


@pytest.mark.slow
def test_the_base_goes_on_from_what_it_ended_with(folder):
    course = json.loads((folder / "results.json").read_text())["courses"][0]
    rows = [json.loads(line) for line in (folder / "seed-0" / "base-run" / "metrics.jsonl").read_text().splitlines()]
    ended = [row["loss_per_loop"] for row in rows if row["kind"] == "evaluation"][-1]
    assert course["loss_per_loop"][0] == pytest.approx(ended, rel=1e-5)


@pytest.mark.slow
def test_the_report_shows_what_was_measured(folder):
    report = (folder / "report.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    for measured in (results["courses"][1]["expected_loss"][0], results["courses"][2]["loss_per_loop"][2][3]):
        assert f"{measured:.3f}" in report
    assert "interleave minus stack, seed by seed" in report
    assert (folder / "upcycling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_is_done_is_not_done_again(folder, monkeypatch, capsys):
    before = (folder / "results.json").read_bytes()
    for name in ("train", "upcycle", "load", "collect_stdlib"):
        monkeypatch.delattr(upcycling, name)
    assert upcycling.main(["--out", str(folder), "--scale", "smoke"]) == 0
    assert (folder / "results.json").read_bytes() == before
    assert capsys.readouterr().out.endswith("deeper --layers 4\n")
