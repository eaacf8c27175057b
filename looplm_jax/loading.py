"""From a path to a model that runs."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax

from looplm_jax.checkpoints import read_metadata, restore_params
from looplm_jax.codec import from_dict
from looplm_jax.config import MeshConfig, Recipe
from looplm_jax.data.tokenizers import Tokenizer, deserialize
from looplm_jax.models.looplm import LoopLM, Params, boxed_params
from looplm_jax.sharding import abstract, check_divides, make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its parameters and all that a checkpoint says about it. `model, params = load(path)` works too."""

    model: LoopLM
    params: Params
    tokenizer: Tokenizer
    recipe: Recipe
    step: int
    warnings: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params))


def load(path: str | os.PathLike[str], *, step: int | None = None, mesh: MeshConfig | None = None) -> Loaded:
    """The model of a checkpoint, its parameters verified against their digests.

    Args:
      path: a run folder, its `checkpoints` folder or one step.
      step: which step; default: the newest good one.
      mesh: devices to spread the parameters over; default: the first device alone.

    Raises:
      UserError: not a checkpoint, no good step, or a mesh that does not fit.
    """
    metadata = read_metadata(os.fspath(path), step)
    recipe = from_dict(Recipe, metadata.config)
    model = LoopLM(recipe.model, recipe.compute)
    devices = make_mesh(mesh or MeshConfig(), jax.devices() if mesh else jax.local_devices()[:1])
    check_divides(devices, recipe.model)
    wanted = abstract(lambda: boxed_params(model, jax.random.key(0)), devices)
    restored = restore_params(os.fspath(path), wanted, step=step)
    return Loaded(
        model=model,
        params=restored.state,
        tokenizer=deserialize(restored.metadata.tokenizer_kind, restored.metadata.tokenizer),
        recipe=recipe,
        step=restored.step,
        warnings=tuple(str(damaged) for damaged in restored.damaged),
    )
