"""Seconds until eight prompts of 64 to 512 tokens have their first tokens, beside our exported model in transformers.

    python -m experiments.benchmarks.first_token

The engine gets all prompts at one time and goes on with each: its ticks are part of what is measured. PyTorch reads
them once one after the other and once padded to one batch, and makes no second token. Weights are random and the same:
a checkpoint is written and exported. All sides take turns in one process; ratios are medians of pairs.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from looplm_jax.config import ComputeConfig, Dtype, ModelConfig, Remat
from looplm_jax.convert import convert_to_hf
from looplm_jax.convert.converted import converted_recipe, write_converted
from looplm_jax.data.tokenizers import SymbolTokenizer
from looplm_jax.inference import Engine, EngineConfig
from looplm_jax.models.looplm import LoopLM, init_params

_LENGTHS = tuple(range(64, 513, 64))
_NEW_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chunk", type=int, nargs="+", default=[512], help="tokens that the engine reads at one time")
    parser.add_argument("--pairs", type=int, default=7, help="turns that all sides take (default: 7)")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch's threads leave the cores to ours
    config = ModelConfig(
        vocab_size=8192,
        width=arguments.width,
        mlp_width=arguments.width * 11 // 4,
        num_layers=arguments.layers,
        num_heads=arguments.width // 64,
        max_positions=1024,
        loops=4,
    )
    model = LoopLM(config, ComputeConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE))
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, config.vocab_size, length).tolist() for length in _LENGTHS]
    sides: dict[str, Callable[[], list[int]]] = {
        f"looplm_jax, chunk={chunk}": functools.partial(_ours, _engine(model, params, chunk), prompts)
        for chunk in arguments.chunk
    }
    twin = _exported(config, params)
    sides["PyTorch, one after the other"] = functools.partial(_one_by_one, twin, prompts)
    sides["PyTorch, one padded batch"] = functools.partial(_padded, twin, prompts)
    _print(_measure(sides, arguments.pairs))


def _engine(model: LoopLM, params: Any, chunk: int) -> Engine:
    return Engine(model, params, config=EngineConfig(slots=len(_LENGTHS), capacity=1024, chunk=chunk))


def _exported(config: ModelConfig, params: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        run, exported = Path(folder) / "run", Path(folder) / "exported"
        write_converted(run, converted_recipe(run, config), params, SymbolTokenizer(["a", "b"]))
        convert_to_hf(run, exported)
        return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()


def _ours(engine: Engine, prompts: Sequence[list[int]]) -> list[int]:
    tickets = [engine.submit(request) for request in engine.requests(prompts, max_new_tokens=_NEW_TOKENS)]
    firsts: dict[int, int] = {}
    while len(firsts) < len(prompts):
        engine.step()
        for number, ticket in enumerate(tickets):
            for new in ticket.ready():
                firsts.setdefault(number, new.token)
    for ticket in tickets:
        ticket.cancel()
    return [firsts[number] for number in range(len(prompts))]


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


def _measure(sides: dict[str, Callable[[], list[int]]], pairs: int) -> dict[str, list[float]]:
    """Seconds of every turn of each side, after one that compiles."""
    firsts = {name: run() for name, run in sides.items()}
    expected = next(iter(firsts.values()))
    for name, tokens in firsts.items():
        agreed = sum(own == other for own, other in zip(tokens, expected, strict=True))
        print(f"{name}: {agreed} of {len(expected)} first tokens as on the first side")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _print(seconds: dict[str, list[float]]) -> None:
    ours = next(iter(seconds.values()))
    print("| | seconds to eight first tokens | over those of the first side |\n|---|---|---|")
    for name, own in seconds.items():
        ratio = statistics.median(other / first for other, first in zip(own, ours, strict=True))
        print(f"| {name} | {statistics.median(own):.2f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
