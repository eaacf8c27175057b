"""Checkpoints of tiny models with random weights, and tokenizers for them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from looplm_jax.checkpoints import CheckpointStore, Metadata
from looplm_jax.codec import to_dict
from looplm_jax.config import ModelConfig, Recipe, Stage
from looplm_jax.convert._layout import array_shapes
from looplm_jax.data.tokenizers import END_OF_TEXT, IM_END, IM_START, SymbolTokenizer

# This works without the package `tokenizers`; the names are those of Ouro.
SYMBOLS = SymbolTokenizer((END_OF_TEXT, IM_START, IM_END, *(f"word{n}" for n in range(20))))
TINY = ModelConfig(
    vocab_size=SYMBOLS.vocab_size,
    width=16,
    mlp_width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    loops=3,
    max_positions=64,
    rope_theta=1e4,
    init_std=0.3,
)
STAGES = (
    Stage(name="pretrain", steps=30, batch_size=4, sequence_length=32, loops=3),
    Stage(name="gate", steps=10, batch_size=8, sequence_length=16, loops=3),
)


def tiny_recipe(model=TINY, **changes):
    return Recipe(**{"name": "tiny", "description": "for tests", "model": model, "stages": STAGES, **changes})


def random_params(model, dtype="float32", seed=0):
    """Returns random parameters, including norms and biases, so that no swap of two tensors goes unnoticed."""
    numbers = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(numbers.normal(scale=0.3, size=leaf.shape).astype(jnp.dtype(dtype)))

    return jax.tree.map(draw, array_shapes(model))


def write_checkpoint(run, recipe=None, *, params=None, dtype="float32", step=30, tokenizer=SYMBOLS):
    """Writes a run folder with one step; returns its path."""
    recipe = recipe or tiny_recipe()
    params = random_params(recipe.model, dtype) if params is None else params
    metadata = Metadata(
        config=to_dict(recipe),
        tokenizer_kind=tokenizer.kind,
        tokenizer=tokenizer.serialize(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        data_state={},
        extra={"stage": recipe.stages[0].name},
    )
    store = CheckpointStore(run / "checkpoints", keep=9, asynchronous=False)
    store.save(step, {"params": params}, metadata)
    return run


def changed(model=TINY, **changes):
    return dataclasses.replace(model, **changes)


def read_json(path):
    return json.loads(path.read_text())
