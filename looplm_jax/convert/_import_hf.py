"""Reads a Hugging Face folder of an Ouro or a Huginn, as parameters or into a checkpoint."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from looplm_jax.checkpoints import Metadata
from looplm_jax.checkpoints._arrays import flatten
from looplm_jax.checkpoints._raw import RawStep, write_raw
from looplm_jax.codec import to_dict
from looplm_jax.config import GatePlacement, MeshConfig, ModelConfig, Objective, Recipe, Stage
from looplm_jax.convert._huginn_config import MODEL_TYPE, from_huginn_config, is_huginn
from looplm_jax.convert._huginn_layout import match_huginn_tensors
from looplm_jax.convert._layout import Path as ArrayPath
from looplm_jax.convert._layout import TorchTensor, flat_arrays, unflat_arrays
from looplm_jax.convert._ouro_config import from_ouro_config
from looplm_jax.convert._placement import match_tensors, place_tensors
from looplm_jax.convert._safetensors_io import WeightFolder, has_weights
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.data.tokenizers._folder import read_folder_tokenizer
from looplm_jax.errors import UserError
from looplm_jax.files import staged_folder
from looplm_jax.json_io import read_json_object
from looplm_jax.models._looplm import LoopLM, Params, boxed_shapes
from looplm_jax.sharding import abstract_arrays, check_divides, first_device, make_mesh

CONFIG, TOKENIZER = "config.json", "tokenizer.json"

# A checkpoint always names its stage; a converted model was in none.
_STAGE = "converted"
_BATCH, _SEQUENCE = 8, 1024  # the values that `looplm evaluate` takes from the last stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfModel:
    """A model as its Hugging Face folder describes it. `model, params, tokenizer = load_hf(path)` works too."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None  # None if the folder has none
    notes: tuple[str, ...] = ()  # about what the folder leaves open, contradicts, or cannot carry over

    @property
    def model(self) -> LoopLM:
        """Returns the model, to be applied to `params`."""
        return LoopLM(self.config)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params, self.tokenizer))


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


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds Hugging Face weights. Run folders have a config.json too, so the weights decide."""
    return has_weights(path) and not (path / "checkpoints").is_dir()


# Reading and converting


def load_hf(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    uncast: Sequence[str] = (),
) -> HfModel:
    """Returns the model of a Hugging Face folder of an Ouro or a Huginn.

    Each tensor is read directly onto the devices that hold it. Every tensor is matched with the model before the first
    one is read. `looplm_jax.load` also reads checkpoints, and casts to the dtype that the devices compute in.

    Args:
      path: a folder with config.json, safetensors and tokenizer.json.
      mesh: the devices over which the parameters are sharded; None puts them on the first device.
      dtype: float32, bfloat16 or float16; None keeps the stored dtype.
      uncast: top-level groups of parameters that keep the stored dtype regardless of `dtype`.

    Raises:
      UserError: a file is missing, damaged or pickled; a field of the config is not supported; a tensor is missing,
        unexpected, misshapen or not finite; the tokenizer has another vocabulary; or the mesh does not fit the model.
    """
    folder = Path(path)
    weights = WeightFolder.open(folder)
    config = read_hf_config(folder)

    # Nothing large is read before everything is known to fit: first the headers of the files, then the configuration.
    mesh = make_mesh(MeshConfig(), first_device()) if mesh is None else mesh
    check_divides(mesh, config)
    layout: Sequence[TorchTensor] = (
        match_huginn_tensors(weights, config) if is_huginn(config) else match_tensors(weights, config)
    )
    tokenizer, notes = read_hf_tokenizer(folder, config.vocab_size)

    targets = parameter_targets(config, mesh, dtype or weights.common_dtype(tensor.name for tensor in layout))
    # For example the exit gate, which `looplm_jax.load` keeps as stored.
    for tensor in layout:
        if tensor.path[0] in uncast:
            targets[tensor.path] = targets[tensor.path].update(dtype=weights.tensors[tensor.name].dtype)

    params = unflat_arrays(place_tensors(weights, layout, targets))
    return HfModel(config=config, params=params, tokenizer=tokenizer, notes=notes)


def convert_from_hf(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: DTypeLike | None = None
) -> Converted:
    """Writes the model of a Hugging Face folder as the checkpoint `<out>/checkpoints/0`.

    Args:
      folder: a folder with config.json, safetensors and tokenizer.json.
      out: a folder that does not exist, or is empty.
      dtype: dtype of the parameters; None keeps the stored dtype.

    Raises:
      UserError: as `load_hf`, or `out` is not empty, or the file system refuses a write. No partial output remains.
    """
    # Written to a temporary folder and renamed at the end, so that an interrupt leaves no half of a checkpoint.
    with staged_folder(out) as staging:
        model = load_hf(folder, dtype=dtype)
        tokenizer = require_tokenizer(model.tokenizer, folder)
        write_converted(staging, converted_recipe(Path(folder), model.config), model.params, tokenizer)

    return conversion_report(Path(out), model.config, model.params, model.notes)


# Parts of a folder, also used for dense models


def read_hf_config(folder: Path) -> ModelConfig:
    """Returns the model that the `config.json` of an Ouro or a Huginn describes.

    Raises:
      UserError: the file is missing or is not a JSON object, or a field is not supported; the message names it.
    """
    try:
        values = read_json_object(folder / CONFIG)
        return from_huginn_config(values) if values.get("model_type") == MODEL_TYPE else from_ouro_config(values)
    except UserError as error:
        raise with_folder(folder, error) from None


def read_hf_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """Returns the tokenizer of a folder, or None if it has no `tokenizer.json`, and notes about it.

    Raises:
      UserError: the file is damaged, its package is not installed, or it has more than `vocab_size` tokens.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return None, ()

    # A tokenizer with fewer tokens than the model is usual: vocabularies are often padded to a round number.
    tokenizer, notes = read_folder_tokenizer(folder, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{file} has {tokenizer.vocab_size} tokens, but {CONFIG} says vocab_size={vocab_size}, which is fewer; "
            "copy both from the same model"
        )
    return tokenizer, notes


def require_tokenizer(tokenizer: Tokenizer | None, folder: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a folder.

    Raises:
      UserError: the folder has no tokenizer.
    """
    if tokenizer is None:
        raise UserError(
            f"{os.fspath(folder)} has no {TOKENIZER}, which this needs; copy it from where the model comes from"
        )
    return tokenizer


def parameter_targets(config: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> dict[ArrayPath, jax.ShapeDtypeStruct]:
    """Returns the shape, dtype and sharding of every parameter of a model, without allocating them."""
    # Traced, not run.
    wanted = flat_arrays(abstract_arrays(boxed_shapes(config), mesh))
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype), sharding=leaf.sharding) for path, leaf in wanted.items()
    }


def with_folder(folder: Path, error: UserError) -> UserError:
    """Returns the error with the folder in its message."""
    text = str(error)
    return error if str(folder) in text else UserError(f"{folder}: {text}")


# Writing converted weights


def converted_recipe(origin: Path, model: ModelConfig) -> Recipe:
    """Returns a recipe for a model whose own recipe is unknown: named after its folder, with a single stage."""
    length = min(_SEQUENCE, model.max_positions)
    # Without a gate, only the last loop has a loss.
    objective = Objective.LAST_LOSS if model.gate is GatePlacement.NONE else Objective.EXPECTED_LOSS
    stage = Stage(
        name=_STAGE, objective=objective, steps=1, batch_size=_BATCH, sequence_length=length, loops=model.loops
    )
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

    write_raw(folder, RawStep(step=0, arrays=flatten(params, "params"), metadata=metadata))


def conversion_report(out: Path, model: ModelConfig, params: Params, notes: tuple[str, ...]) -> Converted:
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
