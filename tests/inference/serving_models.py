"""One small engine for many tests, so that programs of the same shapes are compiled once."""

import dataclasses
import functools

from inference_models import FakeTokenizer, make_model

from looplm_jax.halting import QExit
from looplm_jax.inference import Engine, EngineConfig, Request
from looplm_jax.models._looplm import LoopLM

LOOPS = 3
CONFIG = EngineConfig(slots=3, capacity=128, chunk=16, page_size=32, unroll=False)
SOUND = Request(prompt_ids=(1,), max_new_tokens=6, policy=QExit(q=0.5))


class Letters(FakeTokenizer):
    """A tokenizer with one character per token; the first token is special."""

    def encode(self, text):
        return [ord(character) - 31 for character in text]

    def decode(self, ids):
        return "".join(chr(token + 31) for token in ids if token)


@functools.cache
def small_model():
    """Returns a model of 96 tokens, which the devices of a mesh divide."""
    model, params = make_model(num_layers=1, loops=LOOPS)
    config = dataclasses.replace(model.config, vocab_size=Letters.vocab_size)
    params = {**params, "embedding": params["embedding"][:96], "head": params["head"][:, :96]}
    return LoopLM(config, model.compute), params


def make_engine(programs=None, **changes):
    return Engine(*small_model(), Letters(), config=dataclasses.replace(CONFIG, **changes), programs=programs)


def finish(engine, handles):
    """Steps the engine until it is idle, and returns the results."""
    while engine.step():
        pass
    return [handle.result(timeout=0) for handle in handles]
