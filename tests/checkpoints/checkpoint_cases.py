"""States and metadata for the checkpoint tests."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from looplm_jax.checkpoints import Metadata
from looplm_jax.checkpoints._step import StepFolder, list_steps


class Moments(NamedTuple):
    count: jax.Array
    mean: Any


class TrainState(flax.struct.PyTreeNode):
    step: jax.Array
    params: Any
    optimizer: Any
    flags: tuple[jax.Array, ...]


def make_state(seed: int = 0) -> TrainState:
    """Returns a state with every kind of container and dtype that training uses, derived from `seed`."""
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (64, 32)),
        "core": {"kernel": jax.random.normal(key, (2, 8, 8), jnp.bfloat16), "scale": jnp.full((8,), 0.5)},
    }
    return TrainState(
        step=jnp.int32(seed),
        params=params,
        optimizer=(Moments(count=jnp.int32(7), mean=jax.tree.map(jnp.ones_like, params)), ()),
        flags=(jnp.array([True, False, True]), jnp.array(True), jax.random.key_data(key), jnp.float32(-0.0)),
    )


def make_metadata(step: int = 0) -> Metadata:
    return Metadata(
        config={"name": "tiny", "model": {"width": 64}},
        tokenizer_kind="sentencepiece",
        tokenizer=bytes(range(256)),
        tokenizer_fingerprint="abc123",
        data_state={"position": step, "sources": [1, 2]},
        extra={"stage": "pretrain"},
    )


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_identical(actual: Any, wanted: Any) -> None:
    """Asserts that two states are equal in structure, dtype and every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def step_folder(folder: Path, step: int) -> StepFolder:
    return next(found for found in list_steps(epath.Path(folder)) if found.step == step)
