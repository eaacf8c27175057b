"""Time to the first tokens of eight prompts of 64 to 512 tokens, beside our exported model in transformers.

    python -m experiments.benchmarks.first_token

All prompts are submitted together, and every side samples exactly one greedy token for each: the engine through its
queue and slots; PyTorch one prompt after another, and all of them in one padded batch. Weights are random and the same
on all sides, since a checkpoint is written and exported. The sides take turns in one process. Ratios are medians of
pairs, by the clock and by the CPU time of the process, which other work on the machine changes less.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.decode_exported import export
from experiments.benchmarks.train_step import shape
from looplm_jax.config import ComputeConfig, Dtype, Remat
from looplm_jax.inference import Engine, EngineConfig
from looplm_jax.models import LoopLM, init_params

_LENGTHS = tuple(range(64, 513, 64))


@dataclasses.dataclass(frozen=True)
class _Time:
    """What one turn of a side took, in seconds."""

    clock: float
    cpu: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all sides and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chunk", type=int, nargs="+", default=[512, 256], help="EngineConfig.chunk of our sides")
    parser.add_argument("--pairs", type=int, default=7, help="turns that all sides take (default: 7)")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # so that PyTorch's idle threads leave the cores to ours

    config = shape(arguments.width, arguments.layers)
    model = LoopLM(config, ComputeConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE))
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, config.vocab_size, length).tolist() for length in _LENGTHS]

    sides: dict[str, Callable[[], list[int]]] = {
        f"looplm_jax, chunk={chunk}": functools.partial(_ours, _engine(model, params, chunk), prompts)
        for chunk in arguments.chunk
    }
    twin = export(config, params)
    sides["PyTorch, one after another"] = functools.partial(_one_by_one, twin, prompts)
    sides["PyTorch, one padded batch"] = functools.partial(_padded, twin, prompts)
    _print(_measure(sides, arguments.pairs))


def _engine(model: LoopLM, params: Any, chunk: int) -> Engine:
    return Engine(model, params, config=EngineConfig(slots=len(_LENGTHS), capacity=1024, chunk=chunk))


def _ours(engine: Engine, prompts: Sequence[list[int]]) -> list[int]:
    return [result.tokens[0] for result in engine.generate(prompts, max_new_tokens=1)]


def _one_by_one(model: Any, prompts: Sequence[list[int]]) -> list[int]:
    import torch

    with torch.inference_mode():
        return [
            int(model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
            for prompt in prompts
        ]


def _padded(model: Any, prompts: Sequence[list[int]]) -> list[int]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].argmax(-1).tolist()


def _measure(sides: dict[str, Callable[[], list[int]]], pairs: int) -> dict[str, list[_Time]]:
    """Returns the times of every turn of each side, after one turn that compiles."""
    firsts = {name: run() for name, run in sides.items()}
    expected = next(iter(firsts.values()))
    for name, tokens in firsts.items():
        agreed = sum(own == other for own, other in zip(tokens, expected, strict=True))
        print(f"{name}: {agreed} of {len(expected)} first tokens as on the first side")

    times: dict[str, list[_Time]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, run in sides.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run()
            times[name].append(_Time(clock=time.perf_counter() - clock, cpu=time.process_time() - cpu))
    return times


def _print(times: dict[str, list[_Time]]) -> None:
    ours = next(iter(times.values()))
    print("| | seconds | over the first side | CPU seconds | over the first side |\n|---|---|---|---|---|")
    for name, own in times.items():
        clock, cpu = statistics.median(each.clock for each in own), statistics.median(each.cpu for each in own)
        clock_ratio = statistics.median(each.clock / first.clock for each, first in zip(own, ours, strict=True))
        cpu_ratio = statistics.median(each.cpu / first.cpu for each, first in zip(own, ours, strict=True))
        print(f"| {name} | {clock:.2f} | {clock_ratio:.2f}x | {cpu:.2f} | {cpu_ratio:.2f}x |")


if __name__ == "__main__":
    main()
