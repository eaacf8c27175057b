"""Tokens per second of our train step, and of a plain PyTorch twin of the same model and loss.

    make bench                                             # or: python -m experiments.benchmarks.train_step

Both run complete optimizer steps of Eq. 4 with AdamW: width 256, feed-forward width 704, 4 layers, 4 loops, 8,192
tokens in the vocabulary, 8 sequences of 256, float32. They alternate step by step in one process, so that a drift of
the machine's speed affects both; the ratio is the median of the pairs. The twin is eager PyTorch with fused attention;
`--compile` uses `torch.compile`.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from looplm_jax.config import ComputeConfig, Dtype, MeshConfig, ModelConfig, Recipe, Remat, Stage
from looplm_jax.data.packing import Batch
from looplm_jax.models import presets
from looplm_jax.models.looplm import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training.flops import train_flops_per_token
from looplm_jax.training.program import StagePrograms, place
from looplm_jax.training.state import initial_state

_BATCH, _LENGTH, _LOOPS, _BETA, _LEARNING_RATE = 8, 256, 4, 0.05, 3e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Seconds of every step of both, and their final losses."""

    ours: list[float]
    twin: list[float]
    our_loss: float
    twin_loss: float

    @property
    def speedup(self) -> float:
        """Returns the median over the pairs of the twin's time divided by ours."""
        return statistics.median(twin / ours for ours, twin in zip(self.ours, self.twin, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="counted steps of each, after two that are not")
    parser.add_argument("--remat", choices=[choice.value for choice in Remat], default=Remat.LAYER.value)
    parser.add_argument("--compile", action="store_true", help="put the twin through torch.compile")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)

    config = presets.small()
    batch = _batch(config)
    result = _measure(
        _our_step(config, Remat(arguments.remat), batch), _twin_step(config, batch, arguments.compile), arguments.steps
    )

    _print(config, result)
    if arguments.json:
        arguments.json.write_text(json.dumps({**dataclasses.asdict(result), "speedup": result.speedup}, indent=2))


def _measure(ours: Callable[[], float], twin: Callable[[], float], steps: int) -> Result:
    """Runs both in turn, after two uncounted steps each."""
    # The first steps include compilation.
    for step in (ours, twin) * 2:
        step()

    our_seconds, twin_seconds = [], []
    our_loss = twin_loss = 0.0

    for _ in range(steps):
        start = time.perf_counter()
        our_loss = ours()
        middle = time.perf_counter()
        twin_loss = twin()
        our_seconds.append(middle - start)
        twin_seconds.append(time.perf_counter() - middle)

    return Result(ours=our_seconds, twin=twin_seconds, our_loss=our_loss, twin_loss=twin_loss)


# The two steps, and their batch


def _our_step(config: ModelConfig, remat: Remat, batch: Batch) -> Callable[[], float]:
    """Returns a function that runs our step and returns its loss."""
    stage = Stage(
        name="bench", steps=1000, batch_size=_BATCH, sequence_length=_LENGTH, loops=_LOOPS, beta=_BETA,
        learning_rate=_LEARNING_RATE,
    )  # fmt: skip

    compute = ComputeConfig(dtype=Dtype.FLOAT32, remat=remat)
    recipe = Recipe(name="bench", model=config, stages=(stage,), compute=compute)
    model, mesh = LoopLM(config, compute), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    programs = StagePrograms(recipe, model, stage, mesh, first_step=0)

    start = time.perf_counter()
    programs.compile(_LOOPS)
    print(f"compiled our step in {time.perf_counter() - start:.1f} s")
    state = initial_state(recipe, model, stage, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = programs.run(_LOOPS, state, place(batch, stage, mesh))
        return float(metrics.loss)

    return step


def _twin_step(config: ModelConfig, batch: Batch, compiled: bool) -> Callable[[], float]:
    """Returns a function that runs the twin's step and returns its loss."""
    import torch

    from experiments.benchmarks.torch_twin import TorchLoopLM, TorchTrainer

    model = TorchLoopLM(config)
    trainer = TorchTrainer(model, _LOOPS, _BETA, _LEARNING_RATE)
    if compiled:
        model.compile()
    tokens, targets = (torch.tensor(part, dtype=torch.int64) for part in (batch.tokens, batch.targets))
    return lambda: trainer.step(tokens, targets)


def _batch(config: ModelConfig) -> Batch:
    """Returns sequences of random tokens, one document each."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (_BATCH, _LENGTH + 1), dtype=np.int32)
    shape = (_BATCH, _LENGTH)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(_LENGTH, dtype=np.int32), shape),
        loss_mask=np.ones(shape, np.float32),
    )


def _print(config: ModelConfig, result: Result) -> None:
    """Prints the speed of both, and their ratio."""
    flops = train_flops_per_token(config, loops=_LOOPS, sequence_length=_LENGTH)
    for name, seconds, loss in (
        ("looplm_jax", result.ours, result.our_loss),
        ("PyTorch twin", result.twin, result.twin_loss),
    ):
        rate = _BATCH * _LENGTH / statistics.median(seconds)
        spread = f"{min(seconds):.2f}-{max(seconds):.2f} s a step"
        print(f"{name:13} {rate:7.0f} tokens/s  {rate * flops / 1e9:6.1f} GFLOP/s  ({spread}; last loss {loss:.3f})")
    print(f"speed-up over the twin, median of {len(result.ours)} pairs: {result.speedup:.2f}x")


if __name__ == "__main__":
    main()
