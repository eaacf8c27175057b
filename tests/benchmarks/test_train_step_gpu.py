"""The benchmark for one GPU runs on a machine without a GPU, and names what it could not measure."""

import argparse
import functools

import pytest

from experiments.benchmarks import train_step_gpu

TINY = argparse.Namespace(shape="tiny", length=None, batch=2, steps=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch while it traces
def test_both_sides_begin_at_about_the_same_loss(monkeypatch):
    """The layers of the twin are traced as whole graphs; TorchInductor would compile them to C++ for two minutes."""
    torch = pytest.importorskip("torch", reason="the twin needs torch: `make torch` installs it")
    compiled = functools.partialmethod(torch.nn.Module.compile, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    names = ("looplm_jax, remat layer", "PyTorch twin, recomputing", "PyTorch twin")
    ours, *twins = [train_step_gpu._side(name, TINY) for name in names]
    assert all(len(side.seconds) == 1 for side in (ours, *twins))
    assert all(abs(twin.loss - ours.loss) < 0.1 for twin in twins)


def test_a_side_that_fails_is_named_and_not_measured(capsys):
    train_step_gpu.main(
        ["--shape", "tiny", "--steps", "1", "--turns", "1", "--remat", "layer", "--no-twin", "--batch", "0"]
    )
    assert "batch_size must be at least 1" in capsys.readouterr().out
