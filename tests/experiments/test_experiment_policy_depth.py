"""The experiment policy-depth: its grid, its measures and its report; slow: a complete run at smoke scale."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import policy_depth
from experiments.__main__ import main
from experiments.command import EXPERIMENTS
from experiments.frame import Record, Scale
from experiments.policy_depth import DRAWN, HALF, HALFWAY, LAST_LOOP, POLICY_DEPTH, Answers
from looplm_jax.config import Credit, LoopWeights, Objective

# Grids


def test_every_scale_has_cells_of_their_own_names_whose_settings_are_plain():
    assert EXPERIMENTS[POLICY_DEPTH.name] is POLICY_DEPTH
    for scale in POLICY_DEPTH.scales:
        cells = POLICY_DEPTH.cells(scale)
        assert len({cell.name for cell in cells}) == len(cells) > 0
        for cell in cells:
            assert cell.name.replace("-", "").replace("_", "").isalnum()
            assert json.loads(json.dumps(cell.settings)) == cell.settings


@pytest.mark.parametrize("scale", POLICY_DEPTH.scales, ids=lambda scale: scale.value)
def test_every_arm_of_policy_depth_is_a_recipe_that_differs_from_the_others(scale, tmp_path):
    found = set()
    cells = POLICY_DEPTH.cells(scale)
    for cell in cells:
        recipe = policy_depth._recipe(cell, tmp_path)
        (stage,) = recipe.stages
        assert stage.objective is Objective.POLICY_GRADIENT
        assert recipe.start.checkpoint == str(tmp_path)
        assert stage.trainable == (("gate",) if cell.settings["arm"] == "gate only" else ())
        found.add(str((cell.settings["start"], recipe.seed, stage)))
    assert len(found) == len(cells)


def test_the_arms_of_rltt_have_three_weights_and_only_two_arms_have_a_cost():
    stages = [policy_depth._recipe(cell, Path("start")).stages[0] for cell in POLICY_DEPTH.cells(Scale.CPU)]
    trajectories = [stage.policy.loop_weights for stage in stages if stage.policy.credit is Credit.TRAJECTORY]
    assert set(trajectories) == {LoopWeights.EXIT_PDF, LoopWeights.UNIFORM, LoopWeights.PROGRESSIVE}
    assert len({cell.settings["arm"] for cell in POLICY_DEPTH.cells(Scale.CPU)}) == 9
    assert sum(stage.policy.loop_cost > 0 for stage in stages) == 2 * 3


# Measures


def answers(right, loops, tokens):
    return Answers(right=np.array(right, float), loops=np.array(loops), tokens=np.array(tokens))


def test_changes_are_of_shares_and_of_loops_per_token_and_equal_answers_have_none():
    before = answers([1, 0, 0, 1], [6, 6, 6, 6], [2, 2, 3, 3])
    after = answers([1, 1, 0, 1], [2, 4, 6, 3], [2, 2, 3, 3])
    found = policy_depth.change(before, after)
    assert found["right"] == pytest.approx(0.25)
    assert found["loops"] == pytest.approx(15 / 10 - 24 / 10)
    assert 0 == found["right_interval"][0] < found["right"] < found["right_interval"][1] <= 1
    assert found["loops_interval"][0] < found["loops"] < found["loops_interval"][1] < 0
    assert policy_depth.change(before, before) == {
        "right": 0.0, "right_interval": [0.0, 0.0], "loops": 0.0, "loops_interval": [0.0, 0.0]
    }  # fmt: skip


# Reports


def record(result):
    return Record(cell=str(result), settings={}, result=result, seconds=1.0, versions={})


def policy_record(start, arm, right, loops):
    """Returns a record with these shares of right answers and mean loops, before and after."""
    pairs = zip(("before", "after"), right, loops, strict=True)
    measured = {
        when: {
            "depths": [0.0, share, share, 0.0],
            "rules": {rule: {"right": share, "loops": at} for rule in (DRAWN, HALFWAY)},
        }
        for when, share, at in pairs
    }
    up, down = right[1] - right[0], loops[1] - loops[0]
    changed = {
        "right": up, "right_interval": [up - 0.1, up + 0.1], "loops": down, "loops_interval": [down - 1, down + 1]
    }  # fmt: skip
    return record(
        {
            "start": start,
            "arm": arm,
            "loops": 2,
            **measured,
            "change": dict.fromkeys((DRAWN, HALFWAY), changed),
            "curve": [[1, right[0], loops[0]], [2, right[1], loops[1]]],
            "equal_groups": 0.5,
            "rollout_gap": 1e-6,
        }
    )


def test_policy_depth_reports_changes_with_the_union_of_the_intervals(tmp_path):
    report = POLICY_DEPTH.report(
        [
            policy_record(LAST_LOOP, "gate only", (0.0, 0.5), (1.5, 2.0)),
            policy_record(LAST_LOOP, "gate only", (0.0, 0.7), (1.5, 2.0)),
            policy_record(HALF, "RLTT, exit distribution", (0.4, 0.5), (1.5, 1.0)),
        ]
    )
    drawn, halfway, depths = report.tables
    assert drawn.rows[0] == [
        "last loop", "gate only", "2", "0.0 (0.0 to 0.0)", "60.0 (50.0 to 70.0)", "+60.0 (+40.0 to +80.0)",
        "1.50 (1.50 to 1.50)", "2.00 (2.00 to 2.00)", "+0.50 (-0.50 to +1.50)",
    ]  # fmt: skip
    assert halfway.rows == drawn.rows
    assert [row[:2] for row in depths.rows] == [
        [LAST_LOOP, "before"], [LAST_LOOP, "gate only"], [HALF, "before"], [HALF, "RLTT, exit distribution"]
    ]  # fmt: skip
    assert depths.rows[3][2:] == ["0.0", "50.0", "50.0", "0.0", "37.4, 81.2, 81.2"]
    assert "50 % of groups without a signal" in report.findings[0]
    report.figures["paths.png"](tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 0


# A complete run


@pytest.mark.slow
def test_policy_depth_trains_the_gate_alone_and_measures_before_and_after(tmp_path):
    assert main(["policy-depth", "--root", str(tmp_path)]) == 0
    folder = tmp_path / "policy-depth" / "smoke"
    (found,) = json.loads((folder / "results.json").read_text())["records"]
    result, report = found["result"], (folder / "report.md").read_text()
    assert result["start"] == LAST_LOOP
    # Only the gate was trained, so fixed depths are as before.
    assert result["before"]["depths"] == result["after"]["depths"]
    assert len(result["after"]["depths"]) == 2 * result["loops"]
    assert 1 <= result["after"]["rules"][DRAWN]["loops"] <= result["loops"]
    assert 0 <= result["rollout_gap"] < 1e-2
    assert "gate only" in report
    assert len(list((folder / "starts").glob("last-loop-seed0"))) == 1
