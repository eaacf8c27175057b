"""The experiment on the prior over exit steps: its grid, and its report."""

import numpy as np
import pytest

from experiments.frame import Record
from experiments.prior import PRIOR, UNIFORM, training_figures
from looplm_jax.codec import override
from looplm_jax.config import PriorKind
from looplm_jax.recipes import named_recipe


def record(prior, seed, loss):
    result = {
        "prior": prior,
        "loops": 2,
        "curve": [[1, loss + 1], [2, loss]],
        "training_loss": loss,
        "loss_per_loop": [loss + 0.1, loss],
        "exit_entropy": 0.5,
        "mean_exit_loop": 1.5,
        "held_out": {
            "loss": [loss + 0.2, loss + 0.1],
            "exit_pdf": [0.25, 0.75],
            "expected_loss": loss + 0.125,
            "mean_exit_loop": 1.75,
            "tokens": 10,
        },
    }
    return Record(cell=f"{prior}-{seed}", settings={}, result=result, seconds=1.0, versions={})


def test_priors_are_compared_seed_by_seed(tmp_path):
    losses = {UNIFORM: (3.0, 3.2), "geometric 0.5": (3.1, 3.25)}
    report = PRIOR.report([record(prior, seed, loss) for prior, own in losses.items() for seed, loss in enumerate(own)])
    table, depths = report.tables
    assert [row[:3] for row in table.rows] == [[UNIFORM, "2", "3.1000"], ["geometric 0.5", "2", "3.1750"]]
    assert table.marked == 0
    assert depths.rows[0][3:5] == ["25.0%", "75.0%"]
    assert "uniform (3.1000" in report.findings[0]
    assert "training loss +0.1000, +0.0500" in report.findings[1]
    report.figures["priors.png"](tmp_path / "priors.png")
    assert (tmp_path / "priors.png").stat().st_size > 0


def test_a_report_of_geometric_priors_alone_compares_with_nothing():
    report = PRIOR.report([record("geometric 0.9", 0, 3.0)])
    assert len(report.findings) == 1
    assert report.tables[0].marked is None


def test_the_training_loss_is_that_of_the_last_tenth():
    rows = [
        {
            "step": step,
            "expected_loss": float(step),
            "loss_per_loop": [step, 2 * step],
            "exit_entropy": 1.0,
            "mean_exit_loop": 2.0,
        }
        for step in range(1, 101)
    ]
    found = training_figures(rows)
    assert found["training_loss"] == np.mean(range(91, 101))
    assert found["loss_per_loop"] == pytest.approx([95.5, 191.0])
    assert found["curve"][-1] == [100, 100.0]


@pytest.mark.parametrize("scale", PRIOR.scales)
def test_cells_differ_in_prior_and_seed_alone(scale):
    cells = PRIOR.cells(scale)
    priors = {cell.settings["prior"] for cell in cells}
    assert UNIFORM in priors
    assert len({cell.name for cell in cells}) == len(cells)
    changes = []
    for cell in cells:
        own = dict(cell.settings["model"]["changes"])
        recipe = override(named_recipe(cell.settings["model"]["recipe"]), own)
        kind = PriorKind.UNIFORM if cell.settings["prior"] == UNIFORM else PriorKind.GEOMETRIC
        assert recipe.stages[0].prior.kind is kind
        changes.append({name: value for name, value in own.items() if ".prior." not in name})
    assert all(each == changes[0] for each in changes)
