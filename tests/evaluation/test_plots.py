import sys

import pytest

from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import Curve, DepthSweep, ExitCurve
from looplm_jax.evaluation._plots import plot_depths, plot_exits, plot_training
from looplm_jax.evaluation._reports import depth_table, exit_table
from looplm_jax.terminal import Table

CURVE = Curve.of([1, 2, 3], [3.0, 2.0, 2.5], [0.1, 0.25, 0.2])
SWEEP = DepthSweep(curve=CURVE, trained_loops=3, tokens=1234)
PNG = b"\x89PNG"


def test_figures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    plot_depths({"one": SWEEP, "two": SWEEP}, tmp_path / "depth.png")
    plot_exits({"fixed depth": CURVE}, tmp_path / "exit.png")
    rows = [
        {"kind": "train", "step": step, "loss_per_loop": [2.0, 1.0], "gradient_norm": 1.0, "mean_exit_loop": 1.5}
        for step in range(3)
    ]
    plot_training([*rows, {"kind": "validation", "step": 3, "loss": 1.0}], tmp_path / "training.png")
    plot_training([], tmp_path / "nothing.png")
    for name in ("depth", "exit", "training", "nothing"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


def test_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"figures need matplotlib; pip install 'looplm_jax\[plot\]'"):
        plot_exits({"fixed depth": CURVE}, tmp_path / "exit.png")


def test_depth_table_marks_trained_and_best():
    assert depth_table(SWEEP).markdown().splitlines() == [
        "| loops | loss (nats/token) | accuracy |  |",
        "| ---: | ---: | ---: | ---: |",
        "| 1 | 3.0000 | 10.00% |  |",
        "| 2 | 2.0000 | 25.00% | best |",
        "| **3** | **2.5000** | **20.00%** | **trained** |",
    ]
    assert depth_table(SWEEP).rich().row_count == 3


def test_exit_table_has_both_kinds():
    exits = ExitCurve(
        fixed=CURVE,
        q_exit=CURVE,
        q_grid=(0.0, 0.5, 1.0),
        exit_pdf=(0.2, 0.3, 0.5),
        expected_loss=2.4,
        mean_exit_loop=2.3,
        tokens=1234,
    )
    lines = exit_table(exits).markdown().splitlines()
    assert lines[2] == "| loops=1 | 1.00 | 3.0000 | 10.00% |"
    assert lines[6] == "| q=0.5 | 2.00 | 2.0000 | 25.00% |"


def test_a_cell_stays_in_its_row():
    table = Table(title="cells", columns=("a", "b"), rows=[["one\nline", "x|y"]])
    assert table.markdown().splitlines()[2:] == ["| one line | x\\|y |"]
