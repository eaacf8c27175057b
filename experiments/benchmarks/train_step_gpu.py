"""The train step at the shape of Ouro-1.4B on one GPU, and a plain PyTorch twin under `torch.compile`.

Reports its speed as a fraction of the GPU's measured speed of a matrix product, and its memory.

    python -m experiments.benchmarks.train_step_gpu                  # 24 layers, T = 4, sequences of 4,096, bfloat16
    python -m experiments.benchmarks.train_step_gpu --length 16384 --batch 1    # documents in the Triton kernel
    python -m experiments.benchmarks.train_step_gpu --shape tiny     # to check that it runs, on any machine

Both run complete steps of Eq. 4 with AdamW: float32 parameters, bfloat16 matrix products, cross-entropy over all 49,152
tokens of the vocabulary at every loop. Each layer of the twin is compiled, its attention is
`scaled_dot_product_attention`, and it is measured with and without recomputation of layers in the backward pass; the
faster one that fits counts. Each side has the GPU to itself, in its own process, several times in turn. Times are
medians over all steps, model FLOPs are by formula (`looplm_jax.training._goodput`), and the ceiling is a product of two
square matrices in bfloat16. With `--seconds`, a turn starts only if enough time is left for it, and the table shows
what was measured by then.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.batches import random_batch
from looplm_jax.config import ComputeConfig, Dtype, MeshConfig, ModelConfig, Recipe, Remat, Stage
from looplm_jax.data import Batch
from looplm_jax.models import presets
from looplm_jax.training._goodput import train_flops_per_token

_BETA, _LEARNING_RATE, _WARM_UP = 0.05, 3e-4, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, and the number of tokens per sequence and loops of a step."""

    model: ModelConfig
    length: int
    loops: int = 4


SHAPES = {
    "ouro-1.4b": Shape(model=presets.ouro_1_4b(), length=4096),
    "tiny": Shape(model=dataclasses.replace(presets.tiny(), num_kv_heads=4), length=64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """The measurements of one process. `failed` is the reason if there are no seconds."""

    name: str
    seconds: tuple[float, ...] = ()
    loss: float | None = None
    peak_bytes: int | None = None
    ceiling_flops: float | None = None
    failed: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every side in turn, prints a table, and writes the JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="ouro-1.4b")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: those of the shape)")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step (default: 4)")
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each turn (default: 8)")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side (default: 2)")
    parser.add_argument("--remat", choices=[each.value for each in Remat], nargs="+", default=["layer", "dots"])
    parser.add_argument("--no-twin", action="store_true", help="leave out PyTorch")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time for everything (default: what it takes)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    if arguments.side:
        print(json.dumps(dataclasses.asdict(_side(arguments.side, arguments))))
        return

    names = [f"looplm_jax, remat {remat}" for remat in arguments.remat]
    if not arguments.no_twin:
        names += ["PyTorch twin, recomputing", "PyTorch twin"]

    turns = _take_turns(names, arguments)
    sides = [_together(name, [turn for turn in turns if turn.name == name]) for name in names]
    _print(_shape(arguments), arguments.batch, sides)

    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(side) for side in sides], indent=2))
        print(f"wrote {arguments.json}")


# Taking turns, each in its own process


def _shape(arguments: argparse.Namespace) -> Shape:
    """Returns the shape that the arguments select."""
    shape = SHAPES[arguments.shape]
    return dataclasses.replace(shape, length=arguments.length or shape.length)


def _take_turns(names: Sequence[str], arguments: argparse.Namespace) -> list[Side]:
    """Returns the measurements, turn by turn, while the time left is enough for the longest turn so far."""
    end, longest = time.monotonic() + arguments.seconds, 0.0
    turns = []

    for name in [*names] * arguments.turns:
        start = time.monotonic()
        if end - start <= longest:
            break
        turns.append(_in_own_process(name, arguments, None if end == math.inf else end - start))
        longest = max(longest, time.monotonic() - start)
    return turns


def _in_own_process(name: str, arguments: argparse.Namespace, seconds: float | None) -> Side:
    """Runs one turn of a side in its own process, which frees the GPU memory when it exits."""
    command = [sys.executable, "-m", "experiments.benchmarks.train_step_gpu", "--side", name]
    values = {"shape": arguments.shape, "length": _shape(arguments).length}
    for flag, value in (values | {"batch": arguments.batch, "steps": arguments.steps}).items():
        command += [f"--{flag}", str(value)]

    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Side(name=name, failed="not done when --seconds were over")

    if result.returncode:
        # Out-of-memory errors are the expected failure; their line mentions memory.
        lines = [line for line in result.stderr.splitlines() if "memory" in line.lower()] or result.stderr.splitlines()
        return Side(name=name, failed=lines[-1][:200] if lines else f"exit status {result.returncode}")
    return Side(**json.loads(result.stdout.splitlines()[-1]))


def _together(name: str, turns: Sequence[Side]) -> Side:
    """Returns the steps of all turns of a side, with the highest measured ceiling."""
    worked = [turn for turn in turns if not turn.failed]
    if not worked:
        return turns[0] if turns else Side(name=name, failed="not begun: too little was left of --seconds")
    return dataclasses.replace(
        worked[-1],
        seconds=tuple(second for turn in worked for second in turn.seconds),
        ceiling_flops=max((turn.ceiling_flops for turn in worked if turn.ceiling_flops), default=None),
    )


# One side, in its process


def _side(name: str, arguments: argparse.Namespace) -> Side:
    """Measures one side in this process."""
    shape = _shape(arguments)
    batch = random_batch(shape.model.vocab_size, sequences=arguments.batch, length=shape.length)
    if name.startswith("looplm_jax"):
        return _ours(name, Remat(name.split()[-1]), shape, batch, arguments.steps)
    return _twin(name, "recomputing" in name, shape, batch, arguments.steps)


def _ours(name: str, remat: Remat, shape: Shape, batch: Batch, steps: int) -> Side:
    """Measures our train step."""
    import jax

    from experiments.benchmarks.ceiling import measure_ceiling
    from looplm_jax.models import LoopLM
    from looplm_jax.sharding import make_mesh
    from looplm_jax.training._compile import StagePrograms, to_device
    from looplm_jax.training._state import initial_state

    stage = Stage(
        name="bench",
        steps=1000,
        batch_size=len(batch.tokens),
        sequence_length=shape.length,
        loops=shape.loops,
        beta=_BETA,
        learning_rate=_LEARNING_RATE,
    )

    compute = ComputeConfig(dtype=Dtype.BFLOAT16, remat=remat)
    recipe = Recipe(name="bench", model=shape.model, stages=(stage,), compute=compute)
    model, mesh = LoopLM(shape.model, compute), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    programs = StagePrograms(recipe, model, stage, mesh, first_step=0)
    programs.compile(shape.loops)
    state, on_device = initial_state(recipe, model, stage, mesh), to_device(batch, stage, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = programs.run(shape.loops, state, on_device)
        return float(metrics.loss)

    seconds, loss = _timed(step, steps)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    # The matrices of the ceiling need the memory of the state.
    del state
    ceiling = measure_ceiling(Dtype.BFLOAT16).flops if jax.default_backend() == "gpu" else None
    return Side(name=name, seconds=seconds, loss=loss, peak_bytes=peak, ceiling_flops=ceiling)


def _twin(name: str, recompute: bool, shape: Shape, batch: Batch, steps: int) -> Side:
    """Measures the PyTorch twin."""
    import torch

    from experiments.benchmarks.torch_twin import TorchLoopLM, TorchTrainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TorchLoopLM(shape.model, recompute=recompute).to(device)
    for layer in model.layers:
        layer.compile()  # one program for all layers and loops; the whole model would be 96

    trainer = TorchTrainer(model, shape.loops, _BETA, _LEARNING_RATE, torch.bfloat16)
    tokens, targets = (torch.tensor(part, dtype=torch.int64, device=device) for part in (batch.tokens, batch.targets))

    seconds, loss = _timed(lambda: trainer.step(tokens, targets), steps)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return Side(name=name, seconds=seconds, loss=loss, peak_bytes=peak)


def _timed(step: Callable[[], float], steps: int) -> tuple[tuple[float, ...], float]:
    """Returns the seconds of each counted step, and the last loss; reading the loss waits for the device."""
    for _ in range(_WARM_UP):
        step()

    seconds, loss = [], 0.0
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    return tuple(seconds), loss


# Printing


def _print(shape: Shape, batch: int, sides: Sequence[Side]) -> None:
    """Prints the table, and the ratio of the fastest sides."""
    tokens = batch * shape.length
    flops = train_flops_per_token(shape.model, loops=shape.loops, sequence_length=shape.length)
    ceiling = max((side.ceiling_flops for side in sides if side.ceiling_flops), default=None)

    print(f"{batch} sequences of {shape.length} tokens, T = {shape.loops}; {tokens * flops:.3e} model FLOPs a step")
    if ceiling:
        print(f"ceiling: {ceiling / 1e12:.0f} TFLOP/s, a bfloat16 matrix product measured in this run")

    print("| | tokens/s | model TFLOP/s | of the ceiling | peak GiB | last loss |\n|---|---|---|---|---|---|")
    for side in sides:
        print(f"| {side.name} | " + " | ".join(_cells(side, tokens, flops, ceiling)) + " |")

    ours, twins = ([side for side in sides if side.seconds and ("twin" in side.name) is twin] for twin in (False, True))
    if ours and twins:
        fastest = [min(statistics.median(side.seconds) for side in group) for group in (ours, twins)]
        print(f"the fastest of ours over the fastest twin: {fastest[1] / fastest[0]:.2f}x")


def _cells(side: Side, tokens: int, flops: int, ceiling: float | None) -> list[Any]:
    """Returns the cells of a side."""
    if side.failed:
        return [side.failed, "", "", "", ""]
    rate = tokens / statistics.median(side.seconds)
    return [
        f"{rate:.0f}",
        f"{rate * flops / 1e12:.1f}",
        f"{rate * flops / ceiling:.0%}" if ceiling else "not measured",
        f"{side.peak_bytes / 2**30:.1f}" if side.peak_bytes else "unknown",
        f"{side.loss:.3f}",
    ]


if __name__ == "__main__":
    main()
