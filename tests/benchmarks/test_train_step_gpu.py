"""The benchmark for one GPU runs on a machine without a GPU, and names what it could not measure."""

import json

import pytest

from experiments.benchmarks import train_step_gpu

TINY = ("--shape", "tiny", "--steps", "1", "--turns", "1", "--remat", "layer")


@pytest.mark.slow
def test_the_twin_is_compiled_and_both_begin_at_about_the_same_loss(tmp_path):
    pytest.importorskip("torch", reason="the twin needs torch: `make torch` installs it")
    train_step_gpu.main([*TINY, "--json", str(tmp_path / "figures.json")])
    ours, *twins = json.loads((tmp_path / "figures.json").read_text())
    assert (ours["failed"], len(ours["seconds"])) == ("", 1)
    assert ours["loss"] > 0
    assert all(not twin["failed"] and abs(twin["loss"] - ours["loss"]) < 0.1 for twin in twins)


def test_a_side_that_fails_is_named_and_not_measured(capsys):
    train_step_gpu.main([*TINY, "--no-twin", "--batch", "0"])
    assert "batch_size must be at least 1" in capsys.readouterr().out
