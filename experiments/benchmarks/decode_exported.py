"""Compares decoding in our engine with the same model exported to PyTorch and run by transformers.

    python -m experiments.benchmarks.decode_exported
    python -m experiments.benchmarks.decode_exported --shape small --batches 8 32

A checkpoint of random float32 weights is written and exported with `looplm convert to-hf`'s code. Both sides decode
greedily at a fixed depth of T loops with one request in every row of the batch, after prompts of 32 tokens. They take
turns in one process; the ratio is the median over the pairs. Prompts are not counted: `first_token` measures them.
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
from looplm_jax.convert._import_hf import converted_recipe, write_converted
from looplm_jax.data.tokenizers import SymbolTokenizer
from looplm_jax.halting import FixedLoops
from looplm_jax.inference import Engine, EngineConfig
from looplm_jax.models import LoopLM, Params, init_params, presets

_PROMPT = 32
_CHUNK = 512  # prompt tokens between two steps of our engine


def _large() -> ModelConfig:
    return ModelConfig(vocab_size=8192, width=1024, mlp_width=2816, num_layers=12, num_heads=16, max_positions=4096)


_SHAPES: dict[str, Callable[[], ModelConfig]] = {"large": _large, "small": presets.small, "tiny": presets.tiny}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(_SHAPES), default="large", help="large: 12 layers of width 1024")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each row in a turn (default: 8)")
    parser.add_argument("--ticks", type=int, default=1, help="passes of the stack per step of our engine (default: 1)")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side (default: 5)")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads of PyTorch leave the cores to XLA

    config = _SHAPES[arguments.shape]()
    if arguments.tokens * config.loops % arguments.ticks:
        parser.error(f"--ticks must divide the {arguments.tokens * config.loops} passes of a turn")

    model = LoopLM(config, ComputeConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE))
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    exported = export(config, params)
    print("| batch | ours, tokens/s | PyTorch, tokens/s | ours over PyTorch |\n|---|---|---|---|")
    for batch in arguments.batches:
        prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, _PROMPT))
        ours = _our_side(model, params, prompts, arguments.tokens, arguments.ticks)
        theirs = _torch_side(exported, prompts, arguments.tokens)
        ours(), theirs()
        pairs = [(ours(), theirs()) for _ in range(arguments.pairs)]
        rates = " | ".join(f"{statistics.median(side):.1f}" for side in zip(*pairs, strict=True))
        ratio = statistics.median(mine / other for mine, other in pairs)
        print(f"| {batch} | {rates} | {ratio:.2f}x |", flush=True)


def export(config: ModelConfig, params: Params) -> Any:
    """Returns the model as transformers loads what `looplm convert to-hf` wrote."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        run, exported = Path(folder) / "run", Path(folder) / "exported"
        write_converted(run, converted_recipe(run, config), params, SymbolTokenizer(["a", "b"]))
        convert_to_hf(run, exported)
        return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()


def _our_side(model: LoopLM, params: Params, prompts: np.ndarray, tokens: int, ticks: int) -> Callable[[], float]:
    """Returns a function that decodes `tokens` tokens in every slot and returns tokens per second over all slots."""
    batch, loops = len(prompts), model.config.loops
    # Several prompts are prefilled between two steps, so that all rows have about as many tokens as those of PyTorch.
    # The first has decoded some when the last begins.
    room = tokens + 4 * batch * ticks + 8
    config = EngineConfig(slots=batch, capacity=_PROMPT + room, chunk=_CHUNK, ticks=ticks)
    engine = Engine(model, params, config=config)

    def decode() -> float:
        requests = engine.requests(prompts.tolist(), max_new_tokens=room, policy=FixedLoops(loops=loops))
        handles = [engine.submit(request) for request in requests]
        read = engine.stats.prompt_tokens + prompts.size
        while engine.stats.prompt_tokens < read:
            engine.step()
        engine.step()

        before, start = engine.stats.loops, time.perf_counter()
        for _ in range(tokens * loops // ticks):
            engine.step()
        seconds = time.perf_counter() - start
        if engine.stats.loops - before != tokens * loops * batch:
            raise RuntimeError("a slot was idle")
        for handle in handles:
            handle.cancel()
        while engine.step():
            pass
        return tokens * batch / seconds

    return decode


def _torch_side(model: Any, prompts: np.ndarray, tokens: int) -> Callable[[], float]:
    """Returns the same for the exported model."""
    import torch

    def decode() -> float:
        with torch.inference_mode():
            output = model(torch.from_numpy(prompts), use_cache=True, logits_to_keep=1)
            start = time.perf_counter()
            for _ in range(tokens):
                chosen = output.logits[:, -1:].argmax(-1)
                output = model(chosen, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            return tokens * len(prompts) / (time.perf_counter() - start)

    return decode


if __name__ == "__main__":
    main()
