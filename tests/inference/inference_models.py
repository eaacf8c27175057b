import dataclasses

import jax
import numpy as np

from looplm_jax.config import ComputeConfig, Dtype, Remat
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.models._looplm import LoopLM, init_params
from looplm_jax.models.presets import tiny


def make_model(**changes):
    """Returns a random tiny model with weights large enough for varied gates and predictions.

    NumPy fills the weights, because compiling the initialization takes longer than all tests that use it.
    """
    config = dataclasses.replace(tiny(), **changes)
    model = LoopLM(config, ComputeConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return model, jax.device_put(params)


class FakeTokenizer(Tokenizer):
    """The members that a tokenizer of a test need not have itself."""

    kind, vocab_size, bos_id, eos_id = "fake", 96, 0, 0

    def serialize(self):
        return b""
