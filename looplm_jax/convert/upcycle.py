"""Upcycling: a deeper model whose shared stack repeats the layers of a trained one (paper, section 4.1).

Ouro-2.6B forks from Ouro-1.4B in this way, 24 layers becoming 48. The order of the copies is not printed.
"""

import dataclasses
import enum
import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from looplm_jax.checkpoints import read_metadata
from looplm_jax.checkpoints.whole import read_whole, write_whole
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import ModelConfig, Recipe
from looplm_jax.convert.output_folder import fresh_folder
from looplm_jax.errors import UserError
from looplm_jax.models.looplm import count_params

_STACK = ".core.layers."  # leads to every parameter of the shared stack; layers are its first axis


class Order(enum.Enum):
    """How the copies of L layers lie: each beside its original (0, 0, 1, 1, …), or whole stack upon whole stack."""

    INTERLEAVE = "interleave"
    STACK = "stack"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycled:
    """What was written: a step of the deeper model, and warnings about newer steps that were passed over."""

    out: Path
    step: int
    layers_before: int
    model: ModelConfig
    order: Order
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """For a terminal."""
        layers = f"{self.layers_before} layers became {self.model.num_layers} ({self.order.value})"
        said = f"{layers}: {count_params(self.model):,} parameters; wrote step {self.step} to {self.out}"
        return "\n".join([*(f"warning: {warning}" for warning in self.warnings), said])


def upcycle(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], *, layers: int, order: Order) -> Upcycled:
    """Writes `<out>/checkpoints/<step>`: the newest good step of `checkpoint` with a shared stack of `layers` layers.

    The state of the optimiser follows its parameters; everything else stays as it is. The place in the data is
    dropped: a new run begins there, with `start.checkpoint`.

    Args:
      checkpoint: a run folder, its `checkpoints` folder, or one step.
      out: a folder that does not exist, or is empty.
      layers: a multiple of the layers of the model.
      order: how the copies lie.

    Raises:
      UserError: not a checkpoint, no good step, a number of layers that copies cannot give, `out` is not empty, or the
        disk refused. Nothing half-written remains.
    """
    before = from_dict(Recipe, read_metadata(os.fspath(checkpoint)).config)
    _check_layers(os.fspath(checkpoint), before.model.num_layers, layers)
    recipe = dataclasses.replace(before, model=dataclasses.replace(before.model, num_layers=layers))
    with fresh_folder(out) as staging:
        whole = read_whole(checkpoint)
        chosen = source_layers(order, before.model.num_layers, layers)
        metadata = dataclasses.replace(whole.metadata, config=to_dict(recipe), data_state={})
        write_whole(staging, dataclasses.replace(whole, arrays=_deepen(whole.arrays, chosen), metadata=metadata))
    return Upcycled(
        out=Path(out),
        step=whole.step,
        layers_before=before.model.num_layers,
        model=recipe.model,
        order=order,
        warnings=tuple(str(damaged) for damaged in whole.damaged),
    )


def source_layers(order: Order, before: int, after: int) -> tuple[int, ...]:
    """For each of `after` layers, which of the `before` original ones it is a copy of."""
    originals, copies = np.arange(before), after // before
    chosen = np.repeat(originals, copies) if order is Order.INTERLEAVE else np.tile(originals, copies)
    return tuple(chosen.tolist())


def _deepen(arrays: dict[str, Array], chosen: Sequence[int]) -> dict[str, Array]:
    layers = jnp.asarray(chosen, jnp.int32)
    return {name: jnp.take(array, layers, axis=0) if _in_stack(name) else array for name, array in arrays.items()}


def _in_stack(name: str) -> bool:
    """Whether the dotted name of an array, of a parameter or of its optimiser state, leads through the stack."""
    return _STACK in f".{name}"


def _check_layers(checkpoint: str, before: int, after: int) -> None:
    if after <= before or after % before:
        raise UserError(
            f"the {before} layers of {checkpoint} cannot become {after}: copies of all of them make "
            f"{2 * before}, {3 * before} and so on"
        )
