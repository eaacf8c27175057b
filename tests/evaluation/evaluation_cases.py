import dataclasses

import jax
import numpy as np

from looplm_jax.config import ComputeConfig, DataConfig, Dtype, MeshConfig, Recipe, Remat, SourceConfig, Stage
from looplm_jax.data import Batch
from looplm_jax.data.tasks import make_task
from looplm_jax.loading import Loaded
from looplm_jax.models._looplm import LoopLM, init_params
from looplm_jax.models.presets import tiny
from looplm_jax.sharding import make_mesh

TASK = "mano:length=2,modulus=5"


def make_loaded():
    """Returns a random tiny model of a synthetic task as `load` does, with weights large enough for varied gates."""
    tokenizer = make_task(TASK).tokenizer
    config = dataclasses.replace(tiny(), vocab_size=tokenizer.vocab_size, loops=3)
    model = LoopLM(config, ComputeConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE, loss_chunk=16))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    stage = Stage(name="only", steps=1, batch_size=4, sequence_length=24)
    recipe = Recipe(name="test", model=config, stages=(stage,), data=DataConfig(sources=(SourceConfig(path=TASK),)))
    return Loaded(
        model=model,
        params=jax.device_put(params),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        tokenizer=tokenizer,
        recipe=recipe,
        step=7,
        warnings=("step 9 is bad",),
    )


def make_batch(seed, *, vocab_size, rows=4, length=24):
    """Returns a batch with two packed documents per row, then padding; some targets are masked."""
    generator = np.random.default_rng(seed)
    segments = np.repeat([1, 2, 0], [length // 2, length // 3, length - length // 2 - length // 3])
    positions = np.concatenate([np.arange(count) for count in np.unique_counts(segments).counts[[1, 2, 0]]])
    segments, positions = (np.tile(x, (rows, 1)).astype(np.int32) for x in (segments, positions))
    tokens, targets = generator.integers(0, vocab_size, (2, rows, length)).astype(np.int32)
    mask = ((segments > 0) & (generator.random((rows, length)) < 0.7)).astype(np.float32)
    return Batch(tokens=tokens, targets=targets, segment_ids=segments, positions=positions, loss_mask=mask)
