"""A random tiny chat model as `load` returns it, with a tokenizer that needs no optional package."""

import dataclasses

import jax
import numpy as np

from looplm_jax.config import ComputeConfig, Dtype, MeshConfig, Recipe, Remat, Stage
from looplm_jax.data.tokenizers import END_OF_TEXT, IM_END, IM_START, SymbolTokenizer
from looplm_jax.loading import Loaded
from looplm_jax.models._looplm import LoopLM, init_params
from looplm_jax.models.presets import tiny
from looplm_jax.sharding import make_mesh

WORDS = tuple(f"word{number}" for number in range(20))
TOKENIZER = SymbolTokenizer((END_OF_TEXT, IM_START, IM_END, "user", "assistant", "system", *WORDS))


def make_loaded(tokenizer=TOKENIZER, **changes):
    """Returns the model. NumPy fills its weights, to compile nothing; they are large enough to vary the predictions."""
    config = dataclasses.replace(tiny(tokenizer.vocab_size), num_layers=1, loops=3, **changes)
    model = LoopLM(config, ComputeConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return Loaded(
        model=model,
        params=jax.device_put(params),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        tokenizer=tokenizer,
        recipe=Recipe(
            name="chat", model=config, stages=(Stage(name="only", steps=1, batch_size=1, sequence_length=8),)
        ),
        step=7,
        warnings=("step 9 is bad",),
    )
