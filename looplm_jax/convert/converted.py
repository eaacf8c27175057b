"""What a conversion of somebody else's weights writes: a checkpoint of step 0 that holds parameters and no more."""

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
_BATCH, _SEQUENCE = 8, 1024  # for `looplm evaluate`, which takes those of the last stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote."""

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
    """A recipe in the place of the unknown one that trained a model: named after its folder, with one stage."""
    length = min(_SEQUENCE, model.max_positions)
    stage = Stage(name=_STAGE, steps=1, batch_size=_BATCH, sequence_length=length, loops=model.loops)
    name = origin.resolve().name
    return Recipe(name=name, description="converted from a Hugging Face folder", model=model, stages=(stage,))


def write_converted(folder: Path, recipe: Recipe, params: Params, tokenizer: Tokenizer) -> None:
    """Writes `<folder>/checkpoints/0`, which trains on, evaluates and generates like any other checkpoint.

    Raises:
      UserError: the disk refused it. What was written of it then remains: write to a folder that can be thrown away.
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
    """What to tell about parameters that were written to `out`."""
    leaves = jax.tree.leaves(params)
    return Converted(
        out=out,
        model=model,
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        bytes=sum(leaf.nbytes for leaf in leaves),
        dtype=str(leaves[0].dtype),
        notes=notes,
    )
