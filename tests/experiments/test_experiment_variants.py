"""Experiments on variants of a text model: their grids, what they measure, their reports, and their smoke scale."""

import json

import numpy as np
import pytest
from text_fixtures import with_documents

from experiments.__main__ import main
from experiments.equilibrium import EQUILIBRIUM, SIZES, gradients, memory
from experiments.frame import Record, Scale
from experiments.huginn_depth import HUGINN_DEPTH
from experiments.optimizers import OPTIMIZERS
from experiments.ponder import PONDER
from experiments.registry import EXPERIMENTS
from experiments.stabilizers import STABILIZERS, _methods
from experiments.text_variants import best_rate, held_out_at, spikes, training_figures
from looplm_jax.codec import override
from looplm_jax.config import Recipe
from looplm_jax.data.tasks import make_task
from looplm_jax.recipes import named_recipe

ON_TEXT = (OPTIMIZERS, STABILIZERS, HUGINN_DEPTH)


def record(variant, rate, seed, loss, **more):
    result = {
        "variant": variant,
        "loops": 4,
        "rate": rate,
        "seed": seed,
        "steps": 10,
        "parameters": 1000,
        "flops_per_token": 2e6,
        "training_loss": loss,
        "held_out_curve": [[5, loss + 1.0], [10, loss]],
        "spikes": 0,
        "gradient_norm": {"median": 0.5, "high": 1.0, "max": 2.0},
        "seconds_per_step": 0.1,
        "solver_loops": None,
        **more,
    }
    return Record(cell=f"{variant}-{rate}-{seed}", settings={}, result=result, seconds=1.0, versions={})


@pytest.mark.parametrize("experiment", [*ON_TEXT, PONDER, EQUILIBRIUM], ids=lambda each: each.name)
def test_every_scale_has_cells_of_their_own_names(experiment):
    assert EXPERIMENTS[experiment.name] is experiment
    for scale in experiment.scales:
        cells = experiment.cells(scale)
        assert len({cell.name for cell in cells}) == len(cells) > 0
        assert not any(set(cell.name) & set("/ ,") for cell in cells)
        assert all(json.dumps(dict(cell.settings)) for cell in cells)


@pytest.mark.parametrize("experiment", [*ON_TEXT, PONDER], ids=lambda each: each.name)
def test_seeds_come_last_so_that_a_part_of_a_grid_compares_all_variants(experiment):
    for scale in experiment.scales:
        seeds = [int(cell.name.rpartition("seed")[2]) for cell in experiment.cells(scale)]
        assert seeds == sorted(seeds)
        assert len(set(seeds)) == (1 if scale is Scale.SMOKE else 3)


@pytest.mark.parametrize("experiment", ON_TEXT, ids=lambda each: each.name)
def test_every_variant_of_every_scale_is_a_valid_recipe_without_a_guard_against_spikes(experiment):
    for scale in experiment.scales:
        cells = experiment.cells(scale)
        first = [cell for cell in cells if cell.settings["rate"] == cells[0].settings["rate"]]
        for cell in first[: len(first) // (1 if scale is Scale.SMOKE else 3)]:  # one seed
            model = cell.settings["model"]
            recipe = override(named_recipe(model["recipe"]), model["changes"])
            assert isinstance(recipe, Recipe)
            assert recipe.guard.sigma >= 1e6
            assert recipe.stages[0].decay_steps == 0
            assert recipe.log_every == 1
            assert recipe.model.loops == recipe.stages[0].loops == cell.settings["loops"]


def test_all_methods_of_the_league_are_different_models_or_stages():
    alike = {"model.loops": 12, "stages.pretrain.loops": 12, "stages.pretrain.objective": "last_loss"}
    recipes = [override(named_recipe("demo"), {**alike, **changes(12)}) for changes in _methods(192).values()]
    assert len({repr((recipe.model, recipe.stages[0])) for recipe in recipes}) == len(recipes) == 15


def test_spikes_are_far_above_the_mean_of_the_losses_before_them():
    losses = np.full(60, 2.0)
    losses[[30, 50]] = 2.6, 2.4
    assert spikes(losses) == 1


def test_the_figures_of_a_run_are_those_of_its_metrics():
    rows = [
        {"kind": "train", "step": step, "loss": 4.0 - 0.1 * step, "gradient_norm": float(step), "skipped": 1}
        | {"tokens": 100, "tokens_per_second": 50.0}
        for step in range(1, 31)
    ]
    figures = training_figures([*rows, {"kind": "evaluation", "step": 30, "loss_per_loop": [3.0, 1.5]}])
    assert figures["training_loss"] == pytest.approx(4.0 - 0.1 * 29)
    assert figures["curve"][0] == [2, pytest.approx(3.85)]
    assert len(figures["curve"]) == 20
    assert figures["curve"][-1][0] == 30
    assert figures["held_out_curve"] == [[30, 1.5]]
    assert figures["gradient_norm"]["median"] == 15.5
    assert figures["gradient_norm"]["max"] == 30.0
    assert figures["seconds_per_step"] == 2.0
    assert figures["skipped"] == 1


def test_the_best_rate_is_that_of_the_lowest_mean_and_a_diverged_rate_is_never_it():
    results = [{"rate": 1.0, "x": 2.0}, {"rate": 2.0, "x": 1.0}, {"rate": 2.0, "x": 2.5}, {"rate": 3.0, "x": np.nan}]
    rate, best = best_rate(results, lambda result: result["x"])
    assert (rate, len(best)) == (2.0, 2)
    assert best_rate(results[::-1], lambda result: result["x"])[0] == 2.0


def test_held_out_loss_between_evaluations_is_linear():
    result = {"held_out_curve": [[10, 3.0], [20, 2.0]]}
    assert held_out_at(result, 15) == 2.5
    assert np.isnan(held_out_at(result, 5))


def test_optimizers_are_compared_at_equal_steps_and_at_equal_time(tmp_path):
    records = [
        record("adamw", 1e-3, 0, 3.0),
        record("adamw", 3e-3, 0, 3.5),
        record("muon", 1e-3, 0, 2.0, seconds_per_step=0.2),
    ]
    report = OPTIMIZERS.report(records)
    best, rates = report.tables
    assert [row[:5] for row in best.rows] == [
        ["adamw", "0.001", "1", "3.000", "3.000"],
        # In the time of ten steps of AdamW, Muon takes five.
        ["muon", "0.001", "1", "2.000", "3.000"],
    ]
    assert rates.rows == [["adamw", "3.000", "3.500"], ["muon", "2.000", ""]]
    assert "-1.000 at equal steps; +0.000 at equal time" in report.findings[0]
    report.figures["optimizers.png"](tmp_path / "optimizers.png")


def test_the_league_is_in_order_of_held_out_loss_at_the_trained_depth(tmp_path):
    def of(method, rate, loss, spikes=0):
        held_out = {"T/2": loss + 1, "T": loss, "2T": loss + 0.5, "4T": loss + 2}
        figures = {"radius": 0.9, "frobenius": 0.1, "state_rms": 1.0, "relative_step": 0.5, "spikes": spikes}
        return record(method, rate, 0, loss, held_out=held_out, **figures)

    report = STABILIZERS.report([of("plain", 1e-3, 3.0, spikes=2), of("outer", 1e-3, 2.5), of("outer", 3e-3, 2.8)])
    league, rates = report.tables
    assert [row[:7] for row in league.rows] == [
        ["outer", "0.001", "1", "2.500", "2.500", "3.000", "4.500"],
        ["plain", "0.001", "1", "3.000", "3.000", "3.500", "5.000"],
    ]
    assert rates.rows == [["plain", "3.000", ""], ["outer", "2.500", "2.800"]]
    assert "outer (2.500)" in report.findings[0]
    assert report.findings[0].endswith("spikes at some rate: plain.")
    report.figures["stabilizers-T4.png"](tmp_path / "league.png")


def test_test_time_depth_is_reported_beside_the_published_accuracies(tmp_path):
    depths = {"depths": [1, 2, 4, 8], "held_out": [4.0, 3.0, 2.0, 2.5]}
    report = HUGINN_DEPTH.report([record("fixed", 1e-3, seed, 2.0, **depths) for seed in (0, 1)])
    assert report.tables[0].rows[0][:5] == ["fixed", "0.001", "2", "4.000 (4.000 to 4.000)", "3.000 (3.000 to 3.000)"]
    assert "31.25" in report.tables[1].rows[2]
    assert report.findings == ["fixed: best at r = 4 (2.000 nats/token); +0.500 at r = 8, mean of 2 seeds."]
    report.figures["depths.png"](tmp_path / "depths.png")


def test_tests_of_the_ponder_task_share_their_symbols():
    (cell, *_) = PONDER.cells(Scale.CPU)
    largest = make_task(cell.settings["run"]["task"])
    for hops, spec in cell.settings["run"]["tests"].items():
        tokens = make_task(spec).validation_example(0).tokens
        assert largest.tokenizer.decode(tokens).split()[0] == f"<hops_{hops}>"
        assert len(tokens) == largest.max_tokens


def test_ponder_reports_loops_by_difficulty(tmp_path):
    def of(variant, halts, loops):
        accuracy = {"1": 1.0, "2": 0.5}
        result = {"variant": variant, "halts": halts, "most": 6, "accuracy": accuracy, "loops": loops}
        return Record(cell=variant, settings={}, result=result, seconds=1.0, versions={})

    report = PONDER.report([of("fixed", False, {"1": 2.0, "2": 2.0}), of("ACT", True, {"1": 2.0, "2": 3.5})])
    assert report.tables[0].rows[1] == ["ACT", "1", "75.0", "100.0", "50.0", "2.75", "2.00", "3.50"]
    assert report.findings == ["ACT: 2.00 at p = 1, 3.50 at p = 2 of at most 6 loops, mean of 1 seeds."]
    report.figures["ponder.png"](tmp_path / "ponder.png")


def test_equilibria_are_reported_by_memory_gradients_and_loss(tmp_path):
    taken = {"unrolled": [2**20, 2**22], "implicit": [2**20, 2**20]}
    error = {"implicit, 1e-05": {"error": 1e-5, "cosine": 1.0}, "phantom, k=1": {"error": 0.5, "cosine": 0.75}}
    results = (
        {"part": "memory", "loops": [4, 16], "bytes": taken},
        {"part": "gradients", "unrolled": 80, "gradients": error, "seed": 0},
        {"part": "training", **record("unrolled", 1e-3, 0, 3.0).result},
        {"part": "training", **record("implicit", 1e-3, 0, 3.5, seconds_per_step=0.05, solver_loops=7.5).result},
    )
    records = [Record(cell="cell", settings={}, result=result, seconds=1.0, versions={}) for result in results]
    report = EQUILIBRIUM.report(records)
    memory_table, gradient_table, training_table = report.tables
    assert memory_table.rows == [["unrolled", "1.0", "4.0"], ["implicit", "1.0", "1.0"]]
    assert gradient_table.rows[1] == ["phantom, k=1", "5.0e-01", "5.0e-01", "0.7500"]
    # Ten steps of the second run take the time of five of the first.
    assert [row[3:5] for row in training_table.rows] == [["3.000", "4.000"], ["3.500", "3.500"]]
    assert [row[-1] for row in training_table.rows] == ["4.0", "7.5"]
    assert "unrolled 4.00, implicit 1.00" in report.findings[0]
    assert "75% less" in report.findings[0]
    report.figures["memory.png"](tmp_path / "memory.png")


@pytest.mark.slow
def test_implicit_gradients_are_those_of_unrolled_loops_in_constant_memory():
    sizes = SIZES[Scale.SMOKE]
    taken = memory(sizes)
    assert taken["unrolled"][1] > 1.5 * taken["unrolled"][0]
    assert taken["implicit"][1] == pytest.approx(taken["implicit"][0], rel=0.02)
    found = gradients(sizes, seed=0)
    errors = [found[f"phantom, k={loops}"]["error"] for loops in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert found["implicit, 1e-05"]["error"] < min(errors[-1], found["implicit, 0.1"]["error"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizers", "stabilizers", "huginn-depth", "ponder", "equilibrium"])
def test_smoke_scale_runs_and_reports(tmp_path, name):
    root = with_documents(tmp_path)
    assert main([name, "--root", str(root), "--no-compilation-cache"]) == 0
    results = json.loads((root / name / "smoke" / "results.json").read_text())
    assert len(results["records"]) == results["cells"]
    for each in results["records"]:
        result = each["result"]
        assert result.get("part") in ("memory", "gradients") or result["variant"]
        if "curve" in result:  # a run on text, evaluated halfway and at its end
            assert [step for step, _ in result["held_out_curve"]] == [3, 6]
    assert list((root / name / "smoke").glob("*.png"))
