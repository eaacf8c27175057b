"""The ten-minute GPU benchmark runs on a machine without a GPU, and within its time."""

import subprocess
import sys
from pathlib import Path

import pytest
from xla_flags import QUICK_TO_COMPILE

from experiments.benchmarks import attention, train_step_gpu
from experiments.benchmarks.ceiling import Ceiling

SCRIPT = Path(__file__).parents[2] / "experiments/benchmarks/gpu.sh"


def test_attention_is_a_share_of_a_measured_product(monkeypatch, capsys):
    monkeypatch.setattr(attention, "measure_ceiling", lambda dtype: Ceiling(bandwidth=1e9, flops=1e12))
    attention.main(["--lengths", "64", "128", "--tokens", "128", "--heads", "2", "--head-width", "8", "--turns", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu: 1 TFLOP/s, a bfloat16 matrix product"
    assert [line.split(" | ")[:2] for line in lines[3:]] == [["| 2 x 64", "xla"], ["| 1 x 128", "xla"]]


def test_no_turn_begins_for_which_too_little_time_is_left(monkeypatch, capsys):
    """With turns of 4 s in 10 s, two sides have one turn each and the third has none."""
    clock = [0.0]

    def measured(name, arguments, seconds):
        assert seconds == 10 - clock[0]
        clock[0] += 4
        return train_step_gpu.Side(name=name, seconds=(1.0,), loss=5.0)

    monkeypatch.setattr(train_step_gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train_step_gpu, "_in_own_process", measured)
    train_step_gpu.main(["--shape", "tiny", "--seconds", "10", "--remat", "layer"])
    sides = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| looplm", "| PyTorch"))]
    assert [side.split(" | ")[1] for side in sides] == ["256", "256", "not begun: too little was left of --seconds"]


def test_a_side_that_is_not_done_in_time_is_ended(capsys):
    train_step_gpu.main(["--shape", "tiny", "--no-twin", "--remat", "layer", "--turns", "1", "--seconds", "0.2"])
    assert "| looplm_jax, remat layer | not done when --seconds were over |" in capsys.readouterr().out


def test_the_script_knows_one_option():
    result = subprocess.run([SCRIPT, "--small"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


@pytest.mark.slow
def test_every_part_of_the_script_runs():
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK_TO_COMPILE,
    }
    result = subprocess.run([SCRIPT, "--tiny"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for row in ("| 2 x 128 | xla |", "| looplm_jax, remat layer |", "| 2 | fixed T = 4 |"):
        assert row in result.stdout
