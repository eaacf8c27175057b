"""Upcycling: builds a deeper model whose shared stack repeats the layers of a trained one (paper, section 4.1).

Ouro-2.6B is derived from Ouro-1.4B in this way: 24 layers become 48. The paper does not state the order of the copies.
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
from looplm_jax.checkpoints._raw import read_raw, write_raw
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import ModelConfig, Recipe
from looplm_jax.errors import UserError
from looplm_jax.files import staged_folder
from looplm_jax.models._looplm import count_params

_STACK = ".core.layers."  # in the path of every parameter of the shared stack; layers are the first axis


class Order(enum.Enum):
    """The order of copied layers: each next to its original (0, 0, 1, 1, …), or one whole stack after another."""

    INTERLEAVE = "interleave"
    STACK = "stack"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycled:
    """The result of upcycling: one step of the deeper model, and warnings about newer checkpoints that were skipped."""

    out: Path
    step: int
    layers_before: int
    model: ModelConfig
    order: Order
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the report for a terminal."""
        layers = f"{self.layers_before} layers became {self.model.num_layers} ({self.order.value})"
        report = f"{layers}: {count_params(self.model):,} parameters; wrote step {self.step} to {self.out}"
        return "\n".join([*(f"warning: {warning}" for warning in self.warnings), report])


def upcycle(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], *, layers: int, order: Order) -> Upcycled:
    """Writes `<out>/checkpoints/<step>`: the latest valid checkpoint of `checkpoint`, with a stack of `layers` layers.

    The optimizer state is copied along with its parameters; everything else stays as it is. The position in the data is
    dropped: a new run starts from this checkpoint with `start.checkpoint`.

    Args:
      checkpoint: a run folder, its `checkpoints` folder, or one step.
      out: a folder that does not exist, or is empty.
      layers: a multiple of the number of layers of the model.
      order: the order of the copies.

    Raises:
      UserError: `checkpoint` is not a checkpoint, no step is valid, `layers` is not a larger multiple, `out` is not
        empty, or the file system refuses a write. No partial output remains.
    """
    # The metadata is checked before the arrays, which may be large, are read.
    before = from_dict(Recipe, read_metadata(os.fspath(checkpoint)).config)
    _check_layers(os.fspath(checkpoint), before.model.num_layers, layers)
    recipe = dataclasses.replace(before, model=dataclasses.replace(before.model, num_layers=layers))

    with staged_folder(out) as staging:
        whole = read_raw(checkpoint)
        chosen = source_layers(order, before.model.num_layers, layers)
        # The position in the data belongs to the run of the shallower model.
        metadata = dataclasses.replace(whole.metadata, config=to_dict(recipe), data_state={})
        write_raw(staging, dataclasses.replace(whole, arrays=_deepen(whole.arrays, chosen), metadata=metadata))

    return Upcycled(
        out=Path(out),
        step=whole.step,
        layers_before=before.model.num_layers,
        model=recipe.model,
        order=order,
        warnings=tuple(str(step) for step in whole.skipped),
    )


def source_layers(order: Order, before: int, after: int) -> tuple[int, ...]:
    """Returns, for each of `after` layers, the index of the original layer that it copies, below `before`."""
    originals, copies = np.arange(before), after // before
    # repeat: 0 0 1 1 ...; tile: 0 1 ... 0 1 ...
    chosen = np.repeat(originals, copies) if order is Order.INTERLEAVE else np.tile(originals, copies)
    return tuple(chosen.tolist())


def _deepen(arrays: dict[str, Array], chosen: Sequence[int]) -> dict[str, Array]:
    """Returns the arrays with the layers of the shared stack replaced by the chosen copies."""
    # The moments of every optimizer are copied like their parameters: layers are their first axis too.
    layers = jnp.asarray(chosen, jnp.int32)
    return {name: jnp.take(array, layers, axis=0) if _in_stack(name) else array for name, array in arrays.items()}


def _in_stack(name: str) -> bool:
    """Whether the dotted name, of a parameter or of its optimizer state, passes through the shared stack."""
    return _STACK in f".{name}"


def _check_layers(checkpoint: str, before: int, after: int) -> None:
    """Raises UserError unless `after` is a larger multiple of `before`."""
    # A part of a stack would repeat some layers more often than others.
    if after <= before or after % before:
        raise UserError(
            f"the {before} layers of {checkpoint} cannot become {after} by whole copies; choose "
            f"{2 * before}, {3 * before} or another multiple"
        )
