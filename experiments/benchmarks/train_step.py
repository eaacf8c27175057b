"""Compares our train step with a plain PyTorch twin of the same model and loss.

    make bench                                                     # or: python -m experiments.benchmarks.train_step
    python -m experiments.benchmarks.train_step --width 512 --layers 8
    python -m experiments.benchmarks.train_step --memory           # peak memory instead of time

One step is a whole optimizer step of Eq. 4 with AdamW: 4 loops, a vocabulary of 8,192 tokens, 8 sequences of 256
tokens, float32. The two sides take turns, step by step, so that a machine whose speed drifts treats them alike; each
ratio is the median over the pairs. The CPU time of all threads is printed too, because other work on the machine
changes it less than the time that passes. The twin uses PyTorch's fused attention and fused AdamW and runs eagerly;
`--compile` adds the same twin under `torch.compile`.
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from experiments.benchmarks.batches import random_batch
from experiments.benchmarks.ceiling import peak_memory
from looplm_jax.config import ComputeConfig, Dtype, MeshConfig, ModelConfig, Recipe, Remat, Stage
from looplm_jax.models import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._goodput import train_flops_per_token
from looplm_jax.training._state import initial_state

BATCH, LENGTH, LOOPS = 8, 256, 4
_BETA, _LEARNING_RATE = 0.05, 3e-4
EAGER, COMPILED = "PyTorch, eager", "PyTorch, compiled"  # our sides are named after their `remat`

Step = Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Seconds and CPU time of every counted step of one side, and the loss of its last one."""

    seconds: list[float]
    cpu_seconds: list[float]
    loss: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9, help="counted steps of each side, after two that are not")
    parser.add_argument(
        "--remat",
        nargs="+",
        choices=[choice.value for choice in Remat],
        default=[Remat.DOTS.value],
        help="what our backward pass recomputes; each is a side of its own (default: dots)",
    )
    parser.add_argument("--compile", action="store_true", help="add the twin under torch.compile")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of each side instead")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads of PyTorch leave the cores to XLA

    config = shape(arguments.width, arguments.layers)
    names = [*arguments.remat, EAGER] + [COMPILED] * arguments.compile
    if arguments.memory:
        figures: dict[str, object] = _print_memory(config, names)
    else:
        figures = _print_speed(config, _measure(config, names, arguments.steps))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


def shape(width: int, layers: int) -> ModelConfig:
    """Returns a model of this size with heads of width 64."""
    return ModelConfig(
        vocab_size=8192,
        width=width,
        mlp_width=width * 11 // 4,
        num_layers=layers,
        num_heads=width // 64,
        rope_theta=1e4,
        max_positions=4096,
    )


def _measure(config: ModelConfig, names: Sequence[str], steps: int) -> dict[str, Result]:
    sides = {name: _side(name, config) for name in names}
    for step in [*sides.values()] * 2:
        step()

    results = {name: Result(seconds=[], cpu_seconds=[], loss=math.nan) for name in names}
    for _ in range(steps):
        for name, step in sides.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = step()
            results[name].seconds.append(time.perf_counter() - start)
            results[name].cpu_seconds.append(time.process_time() - cpu_start)
            results[name] = dataclasses.replace(results[name], loss=loss)
    return results


# The sides


def _side(name: str, config: ModelConfig) -> Step:
    if name in (EAGER, COMPILED):
        return _twin_step(config, compiled=name == COMPILED)
    return _our_step(config, Remat(name))


def _our_step(config: ModelConfig, remat: Remat) -> Step:
    stage = Stage(
        name="bench",
        steps=1000,
        batch_size=BATCH,
        sequence_length=LENGTH,
        loops=LOOPS,
        beta=_BETA,
        learning_rate=_LEARNING_RATE,
    )
    compute = ComputeConfig(dtype=Dtype.FLOAT32, remat=remat)
    recipe = Recipe(name="bench", model=config, stages=(stage,), compute=compute)
    model, mesh = LoopLM(config, compute), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    programs = StagePrograms(recipe, model, stage, mesh, first_step=0)
    start = time.perf_counter()
    programs.compile(LOOPS)
    print(f"compiled our step in {time.perf_counter() - start:.1f} s", flush=True)
    batch = random_batch(config.vocab_size, sequences=BATCH, length=LENGTH)
    state = initial_state(recipe, model, stage, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = programs.run(LOOPS, state, to_device(batch, stage, mesh))
        return float(metrics.loss)

    return step


def _twin_step(config: ModelConfig, *, compiled: bool) -> Step:
    import torch

    from experiments.benchmarks.torch_twin import TorchLoopLM, TorchTrainer

    model = TorchLoopLM(config)
    trainer = TorchTrainer(model, LOOPS, _BETA, _LEARNING_RATE)
    if compiled:
        model.compile()
    batch = random_batch(config.vocab_size, sequences=BATCH, length=LENGTH)
    tokens, targets = (torch.tensor(part, dtype=torch.int64) for part in (batch.tokens, batch.targets))
    return lambda: trainer.step(tokens, targets)


# Results


def _print_speed(config: ModelConfig, results: dict[str, Result]) -> dict[str, object]:
    flops = train_flops_per_token(config, loops=LOOPS, sequence_length=LENGTH)
    for name, result in results.items():
        rate = BATCH * LENGTH / statistics.median(result.seconds)
        spread = f"{min(result.seconds):.2f}-{max(result.seconds):.2f} s a step"
        print(
            f"{_title(name):27} {rate:7.0f} tokens/s  {rate * flops / 1e9:6.1f} GFLOP/s  "
            f"({spread}, {statistics.median(result.cpu_seconds):.2f} s of CPU time; last loss {result.loss:.3f})"
        )

    speedups = {}
    for ours, theirs in itertools.product(results, (EAGER, COMPILED)):
        if ours not in (EAGER, COMPILED) and theirs in results:
            own, twin = results[ours], results[theirs]
            ratio = _median_ratio(twin.seconds, own.seconds)
            cpu_ratio = _median_ratio(own.cpu_seconds, twin.cpu_seconds)
            speedups[f"{ours} over {theirs}"] = ratio
            print(
                f"speed of {_title(ours)} over {theirs}, median of {len(own.seconds)} pairs: {ratio:.2f}x, "
                f"with {cpu_ratio:.2f}x the CPU time"
            )
    return {"sides": {name: dataclasses.asdict(result) for name, result in results.items()}, "speedups": speedups}


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Returns the median over the pairs."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def _title(name: str) -> str:
    return name if name in (EAGER, COMPILED) else f"looplm_jax, remat={name}"


def _print_memory(config: ModelConfig, names: Sequence[str]) -> dict[str, object]:
    """Prints the peak memory of three steps of each side, each in a process of its own."""
    peaks: dict[str, object] = {}
    context = multiprocessing.get_context("spawn")
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_peak, args=(sender, name, config))
        process.start()
        before, after = receiver.recv()
        process.join()
        peaks[name] = {"after_imports": before, "peak": after}
        mebibytes = after / 2**20, (after - before) / 2**20
        print(f"{_title(name):27} {mebibytes[0]:6.0f} MiB at the peak, {mebibytes[1]:6.0f} MiB without imports")
    return {"bytes": peaks}


def _send_peak(sender: multiprocessing.connection.Connection, name: str, config: ModelConfig) -> None:
    if name in (EAGER, COMPILED):
        import torch  # noqa: F401  (its own memory does not count)
    before = peak_memory()
    step = _side(name, config)
    for _ in range(3):
        step()
    sender.send((before, peak_memory()))


if __name__ == "__main__":
    main()
