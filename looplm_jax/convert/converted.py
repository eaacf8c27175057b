"""Writes converted weights as a checkpoint at step 0, which holds parameters and no optimizer state."""

import dataclasses
import math
from pathlib import Path

import jax

from looplm_jax.checkpoints import Metadata
from looplm_jax.checkpoints.tree import flatten
from looplm_jax.checkpoints.whole import WholeStep, write_whole
from looplm_jax.codec import to_dict
from looplm_jax.config import ModelConfig, Recipe, Stage
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.models.looplm import Params

_STAGE = "converted"
_BATCH, _SEQUENCE = 8, 1024  # the values that `looplm evaluate` takes from the last stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """The result of a conversion."""

    out: Path
    model: ModelConfig
    parameters: int
    bytes: int
    dtype: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        wrote = f"wrote step 0, {self.parameters:,} parameters, {self.bytes:,} bytes of {self.dtype}, to {self.out}"
        return "\n".join((*(f"note: {note}" for note in self.notes), wrote))


def converted_recipe(origin: Path, model: ModelConfig) -> Recipe:
    """Returns a recipe for a model whose own recipe is unknown: named after its folder, with a single stage."""
    length = min(_SEQUENCE, model.max_positions)
    stage = Stage(name=_STAGE, steps=1, batch_size=_BATCH, sequence_length=length, loops=model.loops)
    name = origin.resolve().name
    return Recipe(name=name, description="converted from a Hugging Face folder", model=model, stages=(stage,))


def write_converted(folder: Path, recipe: Recipe, params: Params, tokenizer: Tokenizer) -> None:
    """Writes `<folder>/checkpoints/0`, a checkpoint like any other for training, evaluation and generation.

    Raises:
      UserError: the file system refused the write. Partial output then remains, so write to a folder that can be
        deleted.
    """
    metadata = Metadata(
        config=to_dict(recipe),
        tokenizer_kind=tokenizer.kind,
        tokenizer=tokenizer.serialize(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        data_state={},
        extra={"stage": _STAGE},
    )

    write_whole(folder, WholeStep(step=0, arrays=flatten(params, "params"), metadata=metadata))


def summary(out: Path, model: ModelConfig, params: Params, notes: tuple[str, ...]) -> Converted:
    """Returns the report about parameters that were written to `out`."""
    leaves = jax.tree.leaves(params)
    return Converted(
        out=out,
        model=model,
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        bytes=sum(leaf.nbytes for leaf in leaves),
        dtype=str(leaves[0].dtype),
        notes=notes,
    )
