"""Tokens per second of the engine at fixed depth, with early exit, and with self-speculation.

They are compared with the least time that the bytes and operations of a tick need, and with a plain PyTorch twin that
uses a cache.

    python -m experiments.benchmarks.decode                          # two cores: 12 layers of width 1024, float32
    python -m experiments.benchmarks.decode --shape ouro-1.4b        # an accelerator: the 1.4B shape, bfloat16
    python -m experiments.benchmarks.decode --shape tiny             # to check that it runs

Weights are random, with a gate that is wide enough for exits to differ between tokens. A tick reads the weights of the
stack once, one plane of the cache per slot, and, if a slot chooses a token, the head. The bandwidth and speed behind
the lower bound are measured in the same run, with a sum over a large array and a large matrix product.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.ceiling import Ceiling, measure_ceiling
from looplm_jax.config import ComputeConfig, Dtype, ModelConfig, Remat
from looplm_jax.halting import ExitPolicy, FixedLoops, QExit
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, bytes_per_token, speculate
from looplm_jax.inference._packed_prefill import admit_pack
from looplm_jax.inference._prefill import admit, prefill_chunk
from looplm_jax.inference._tick import run_ticks
from looplm_jax.models import LoopLM, Params, init_params, presets
from looplm_jax.models._blocks import unroll_layers

_GATE_SPREAD = 1.5  # standard deviation of the gate logits
_PROMPT = 32


def _cpu_shape() -> ModelConfig:
    """Returns the shape for two CPU cores."""
    return ModelConfig(
        vocab_size=8192, width=1024, mlp_width=2816, num_layers=12, num_heads=16, max_positions=4096, loops=4
    )


SHAPES = {
    "cpu": (_cpu_shape, Dtype.FLOAT32),
    "ouro-1.4b": (presets.ouro_1_4b, Dtype.BFLOAT16),
    "tiny": (presets.tiny, Dtype.FLOAT32),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One decoding method at one batch size, with tokens per second over all slots. Figures are medians over rounds."""

    name: str
    batch: int
    tokens_per_second: float
    mean_loops: float
    gain: float  # tokens per second relative to fixed T in the same round
    floor_share: float | None  # lower bound of a tick's time over its measured time


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decoded:
    """The result of one turn."""

    seconds: float
    tokens: int
    mean_loops: float

    @property
    def rate(self) -> float:
        """Returns tokens per second."""
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """The model and the settings of the benchmark."""

    config: ModelConfig
    dtype: Dtype
    model: LoopLM
    params: Params
    tokens: int
    rounds: int
    ceiling: Ceiling


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes the JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that all ways to decode take (default: 3)")
    parser.add_argument("--pairs", type=int, default=5, help="turns that we and the twin take (default: 5)")
    parser.add_argument("--no-twin", action="store_true", help="leave out PyTorch")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no other batch size begins after this time (default: all do)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)

    end = time.monotonic() + arguments.seconds
    bench = _prepare(arguments.shape, arguments.tokens, arguments.rounds)
    _print_heading(bench)

    lines = []
    for batch in arguments.batches:
        if time.monotonic() > end:
            print(f"batch {batch} was not begun: --seconds were over")
            continue
        measured = _measure(bench, batch)
        _print(measured)
        lines += measured

    speedup = None if arguments.no_twin else _beside_the_twin(bench, arguments.pairs)
    if speedup is not None:
        print(f"batch 1, fixed T, beside the PyTorch twin with a cache, median of pairs: {speedup:.2f}x")

    if arguments.json:
        values = {"lines": [dataclasses.asdict(line) for line in lines], "speedup_over_twin": speedup}
        arguments.json.write_text(json.dumps({**values, "ceiling": dataclasses.asdict(bench.ceiling)}, indent=2))
        print(f"wrote {arguments.json}")


# The model, and the methods in turn


def _prepare(shape: str, tokens: int, rounds: int) -> Bench:
    """Returns the benchmark of a shape, with random weights."""
    make, dtype = SHAPES[shape]
    config = make()
    model = LoopLM(config, ComputeConfig(dtype=dtype, remat=Remat.NONE))
    params = jax.jit(
        lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype.value), init_params(model, key)),
    )(jax.random.key(0))

    # A gate at init_std would give nearly equal exits: its logits should have a standard deviation of _GATE_SPREAD.
    spread = _GATE_SPREAD / math.sqrt(config.width) / config.init_std
    params["gate"]["kernel"] = params["gate"]["kernel"] * jnp.asarray(spread, dtype.value)

    return Bench(
        config=config,
        dtype=dtype,
        model=model,
        params=params,
        tokens=tokens,
        rounds=rounds,
        ceiling=measure_ceiling(dtype),
    )


def _measure(bench: Bench, batch: int) -> list[Line]:
    """Returns one line per decoding method, measured in turns."""
    policies: dict[str, ExitPolicy] = {"fixed T = 4": FixedLoops(loops=4)}
    policies |= {f"Q-exit, q = {q}": QExit(q=q) for q in (0.3, 0.5, 0.8)}
    engine = _engine(bench, batch)
    drafting = [_speculation(bench, batch, draft_loops) for draft_loops in (1, 2)]

    _run(engine, bench, FixedLoops(loops=4))
    compiled = _programs()
    runs: list[dict[str, _Decoded]] = []
    for _ in range(bench.rounds):
        decoded = {name: _run(engine, bench, policy) for name, policy in policies.items()}
        decoded |= {name: run() for name, run in drafting}
        runs.append(decoded)

    if _programs() != compiled:
        raise RuntimeError("a program was compiled after the warm-up")
    return [_line(engine, bench, name, runs, by_ticks=name in policies) for name in runs[0]]


def _line(engine: Engine, bench: Bench, name: str, runs: Sequence[dict[str, _Decoded]], *, by_ticks: bool) -> Line:
    """Returns the line of one method: medians over its turns."""
    mean_loops = runs[0][name].mean_loops
    floor = _floor_seconds(bench, engine.config.slots, engine.config.capacity, mean_loops) * _ticks(bench)
    return Line(
        name=name,
        batch=engine.config.slots,
        tokens_per_second=statistics.median(run[name].rate for run in runs),
        mean_loops=mean_loops,
        gain=statistics.median(run[name].rate / run["fixed T = 4"].rate for run in runs),
        floor_share=statistics.median(floor / run[name].seconds for run in runs) if by_ticks else None,
    )


# The engine


def _engine(bench: Bench, batch: int) -> Engine:
    """Returns an engine with room for every turn."""
    most = _PROMPT + _ticks(bench) + batch + 2  # if each pass produced a token; slots fill one after another
    capacity = 1 << (most - 1).bit_length()
    return Engine(bench.model, bench.params, config=EngineConfig(slots=batch, capacity=capacity, chunk=_PROMPT))


def _ticks(bench: Bench) -> int:
    """Returns the ticks of a turn."""
    return bench.tokens * bench.config.loops


def _programs() -> list[int]:
    """Returns the number of compiled programs of each kind, to detect compilations."""
    return [program._cache_size() for program in (prefill_chunk, admit, admit_pack, run_ticks)]  # type: ignore[attr-defined]


def _prompts(bench: Bench, count: int) -> list[list[int]]:
    """Returns random prompts."""
    return np.random.default_rng(0).integers(0, bench.config.vocab_size, (count, _PROMPT)).tolist()


def _run(engine: Engine, bench: Bench, policy: ExitPolicy) -> _Decoded:
    """Runs `bench.tokens` times T ticks with a request in every slot, none of which ends during them."""
    slots, ticks = engine.config.slots, _ticks(bench)
    room = engine.config.capacity - _PROMPT
    handles = [
        engine.submit(request)
        for request in engine.requests(_prompts(bench, slots), max_new_tokens=room, policy=policy)
    ]

    read = engine.stats.prompt_tokens + slots * _PROMPT
    while engine.stats.prompt_tokens < read:
        engine.step()
    engine.step()  # its tokens are from a tick with all slots

    tokens, loops, start = engine.stats.tokens, engine.stats.loops, time.perf_counter()
    for _ in range(ticks):
        engine.step()
    seconds = time.perf_counter() - start

    if any(handle.done for handle in handles) or engine.stats.loops - loops != ticks * slots:
        raise RuntimeError("a slot was not at work")
    tokens, loops = engine.stats.tokens - tokens, engine.stats.loops - loops

    for handle in handles:
        handle.cancel()
    while engine.step():
        pass
    return _Decoded(seconds=seconds, tokens=tokens, mean_loops=loops / tokens)


# The lower bound, speculation, and the twin


def _floor_seconds(bench: Bench, batch: int, capacity: int, mean_loops: float) -> float:
    """Returns the lower bound of a tick's time: the slower of reading its bytes and doing its operations."""
    config, itemsize = bench.config, jnp.dtype(bench.dtype.value).itemsize
    stack = sum(leaf.size for leaf in jax.tree.leaves(bench.params["core"]))
    head = config.width * config.vocab_size
    choosing = 1 - (1 - 1 / mean_loops) ** batch  # fraction of ticks in which some slot chooses a token
    plane = bytes_per_token(config, CacheStrategy.LAST, loops=1, dtype=bench.dtype.value) * capacity * batch

    read = (stack + choosing * head) * itemsize + plane
    # Two operations, a multiplication and an addition, per weight and slot.
    operations = 2 * batch * (stack + choosing * head)
    return max(read / bench.ceiling.bandwidth, operations / bench.ceiling.flops)


def _speculation(bench: Bench, batch: int, draft_loops: int) -> tuple[str, Callable[[], _Decoded]]:
    """Returns the name of the method, and a function that decodes once; it is compiled already."""
    prompts, model, params = _prompts(bench, batch), bench.model, bench.params
    if jax.default_backend() == "cpu":  # as the engine does
        model, params = LoopLM(bench.config, model.compute, unrolled=True), unroll_layers(params)

    def run() -> _Decoded:
        start = time.perf_counter()
        results = speculate(model, params, prompts, draft_loops=draft_loops, drafts=4, max_new_tokens=bench.tokens)
        return _Decoded(
            seconds=time.perf_counter() - start,
            tokens=sum(len(result.tokens) for result in results),
            mean_loops=statistics.mean(result.loops_per_token for result in results),
        )

    run()
    return f"speculation, s = {draft_loops} (prompts included)", run


def _beside_the_twin(bench: Bench, pairs: int) -> float:
    """Returns the median of the twin's time per token divided by ours: batch 1, fixed T, in alternating pairs."""
    import torch

    from experiments.benchmarks.torch_decoder import TorchDecoder
    from experiments.benchmarks.torch_twin import TorchLoopLM

    engine, loops = _engine(bench, 1), bench.config.loops
    model = TorchLoopLM(bench.config).to(getattr(torch, bench.dtype.value))
    twin = TorchDecoder(model, batch=1, capacity=engine.config.capacity, loops=loops)
    twin.fill(_PROMPT)

    def decode_twin() -> float:
        tokens = torch.zeros(1, dtype=torch.int64)
        start = time.perf_counter()
        for position in range(_PROMPT, _PROMPT + bench.tokens - 1):
            tokens = twin.step(tokens, position)
        return (time.perf_counter() - start) / (bench.tokens - 1)

    def decode_ours() -> float:
        return 1 / _run(engine, bench, FixedLoops(loops=loops)).rate

    decode_twin(), decode_ours()
    return statistics.median(decode_twin() / decode_ours() for _ in range(pairs))


# Printing


def _print_heading(bench: Bench) -> None:
    """Prints the device's measured limits and the head of the table."""
    bandwidth, flops = bench.ceiling.bandwidth / 1e9, bench.ceiling.flops / 1e9
    print(f"{jax.devices()[0].device_kind}: {bandwidth:.1f} GB/s, {flops:.0f} GFLOP/s measured")
    print(
        "| batch | | tokens/s | mean loops | of fixed T | share of the floor |\n|---|---|---|---|---|---|", flush=True
    )


def _print(lines: Sequence[Line]) -> None:
    """Prints the rows of one batch size."""
    for line in lines:
        share = "" if line.floor_share is None else f"{line.floor_share:.2f}"
        rate = f"{line.tokens_per_second:.1f}"
        print(
            f"| {line.batch} | {line.name} | {rate} | {line.mean_loops:.2f} | {line.gain:.2f}x | {share} |", flush=True
        )


if __name__ == "__main__":
    main()
