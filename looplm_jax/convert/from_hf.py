"""Reads a Hugging Face Ouro folder, as parameters or into a checkpoint."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from looplm_jax.config import MeshConfig, ModelConfig
from looplm_jax.convert.accounting import accounted
from looplm_jax.convert.converted import Converted, converted_recipe, summary, write_converted
from looplm_jax.convert.layout import Path as ArrayPath
from looplm_jax.convert.layout import flat_arrays, unflat_arrays
from looplm_jax.convert.ouro_config import from_ouro_config
from looplm_jax.convert.output_folder import fresh_folder
from looplm_jax.convert.placement import place_tensors
from looplm_jax.convert.weight_files import WeightFolder, has_weights
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.data.tokenizers.folder_files import read_folder_tokenizer
from looplm_jax.errors import UserError
from looplm_jax.json_files import read_json_object
from looplm_jax.models.looplm import Params, boxed_shapes
from looplm_jax.sharding import abstract, check_divides, first_device, make_mesh

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfModel:
    """A model as its folder describes it."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None  # None if the folder has none
    notes: tuple[str, ...] = ()  # about what the folder leaves open, contradicts, or cannot carry over


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds Hugging Face weights. Run folders have a config.json too, so the weights decide."""
    return has_weights(path) and not (path / "checkpoints").is_dir()


# Reading and converting


def load_hf(
    path: str | os.PathLike[str], *, mesh: Mesh, dtype: DTypeLike | None = None, uncast: Sequence[str] = ()
) -> HfModel:
    """Returns the model of a Hugging Face Ouro folder. Each tensor is read directly onto the devices that hold it.

    Every tensor is matched with the model before the first one is read.

    Args:
      path: a folder with config.json, safetensors and tokenizer.json.
      mesh: the devices over which the parameters are sharded.
      dtype: float32, bfloat16 or float16; None keeps the stored dtype.
      uncast: top-level groups of parameters that keep the stored dtype regardless of `dtype`.

    Raises:
      UserError: a file is missing, damaged or pickled; a field of the config is not supported; a tensor is missing,
        unexpected, misshapen or not finite; the tokenizer has another vocabulary; or the mesh does not fit the model.
    """
    folder = Path(path)
    weights = WeightFolder.open(folder)
    config = read_hf_config(folder)

    check_divides(mesh, config)
    layout = accounted(weights, config)
    tokenizer, notes = read_hf_tokenizer(folder, config.vocab_size)

    targets = parameter_targets(config, mesh, dtype or weights.one_dtype(tensor.name for tensor in layout))
    # For example the exit gate, which `looplm_jax.load` keeps as stored.
    for tensor in layout:
        if tensor.path[0] in uncast:
            targets[tensor.path] = targets[tensor.path].update(dtype=weights.tensors[tensor.name].dtype)

    params = unflat_arrays(place_tensors(weights, layout, targets))
    return HfModel(config=config, params=params, tokenizer=tokenizer, notes=notes)


def convert_from_hf(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: DTypeLike | None = None
) -> Converted:
    """Writes the model of a Hugging Face Ouro folder as the checkpoint `<out>/checkpoints/0`.

    Args:
      folder: a folder with config.json, safetensors and tokenizer.json.
      out: a folder that does not exist, or is empty.
      dtype: dtype of the parameters; None keeps the stored dtype.

    Raises:
      UserError: as `load_hf`, or `out` is not empty, or the file system refuses a write. No partial output remains.
    """
    mesh = make_mesh(MeshConfig(), first_device())

    with fresh_folder(out) as staging:
        model = load_hf(folder, mesh=mesh, dtype=dtype)
        tokenizer = needed_tokenizer(model.tokenizer, folder)
        write_converted(staging, converted_recipe(Path(folder), model.config), model.params, tokenizer)
    return summary(Path(out), model.config, model.params, model.notes)


# Parts of a folder, also used for dense models


def read_hf_config(folder: Path) -> ModelConfig:
    """Returns the model that the `config.json` of an Ouro folder describes.

    Raises:
      UserError: the file is missing or is not a JSON object, or a field is not supported; the message names it.
    """
    try:
        return from_ouro_config(read_json_object(folder / CONFIG))
    except UserError as error:
        raise naming(folder, error) from None


def read_hf_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """Returns the tokenizer of a folder, or None if it has no `tokenizer.json`, and notes about it.

    Raises:
      UserError: the file is damaged, its package is not installed, or it has more than `vocab_size` tokens.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return None, ()

    tokenizer, notes = read_folder_tokenizer(folder, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{file} has {tokenizer.vocab_size} tokens, but {CONFIG} says vocab_size={vocab_size}, which is fewer; "
            "copy both from the same model"
        )
    return tokenizer, notes


def needed_tokenizer(tokenizer: Tokenizer | None, folder: str | os.PathLike[str]) -> Tokenizer:
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
    wanted = flat_arrays(abstract(boxed_shapes(config), mesh))
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype), sharding=leaf.sharding) for path, leaf in wanted.items()
    }


def naming(folder: Path, error: UserError) -> UserError:
    """Returns the error with the folder in its message."""
    text = str(error)
    return error if str(folder) in text else UserError(f"{folder}: {text}")
