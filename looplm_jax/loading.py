"""Loads a model, its parameters and its tokenizer from a path."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from looplm_jax.checkpoints import read_metadata, restore_params
from looplm_jax.config import ComputeConfig, MeshConfig, Recipe
from looplm_jax.convert._import_hf import converted_recipe, is_hf_folder, load_hf, require_tokenizer
from looplm_jax.data.tokenizers import Tokenizer, deserialize
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import UNCAST, LoopLM, Params, boxed_shapes, compute_dtype
from looplm_jax.sharding import abstract_arrays, check_divides, first_device, make_mesh, use_mesh

# The dtypes in which devices multiply.
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its parameters and everything else in its checkpoint. `model, params = load(path)` works too.

    Attributes:
      model: the model.
      params: the parameters.
      mesh: the mesh of the devices that hold the parameters.
      tokenizer: the tokenizer, or None for a Hugging Face folder without one.
      recipe: the recipe of the run. A Hugging Face folder does not have one, so it is a placeholder.
      step: the step of the checkpoint, or 0 for a Hugging Face folder.
      warnings: the newer steps that were skipped, or notes about a Hugging Face folder.
      origin: the folder, for messages.
    """

    model: LoopLM
    params: Params
    mesh: Mesh
    tokenizer: Tokenizer | None
    recipe: Recipe
    step: int
    warnings: tuple[str, ...]
    origin: str = "the folder"

    def need_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises UserError if the folder has none."""
        return require_tokenizer(self.tokenizer, self.origin)

    def __iter__(self) -> Iterator[Any]:
        # The two that nearly every caller needs. The other fields have names.
        return iter((self.model, self.params))


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    dtype: DTypeLike | None = None,
) -> Loaded:
    """Loads the model of a checkpoint or of a Hugging Face Ouro folder.

    The parameters of a checkpoint are verified against their digests.

    Args:
      path: a run folder, its `checkpoints` folder, the folder of one step, or a Hugging Face folder.
      step: the number of the step; by default the latest valid one.
      mesh: the devices over which to shard the parameters; by default only the first device.
      dtype: the dtype of the parameters: float32, bfloat16 or float16. By default they keep their stored dtype on a
        CPU. On other platforms they have the dtype of the matrix products, to which every pass would cast them
        otherwise. The gate, which is never cast, keeps its stored dtype.

    Raises:
      UserError: the path is not a checkpoint, there is no valid step, `convert.from_hf.load_hf` refuses the Hugging
        Face folder, the mesh does not fit, or the devices do not support the dtype.
    """
    # Without a mesh, all parameters are on the first device.
    devices = make_mesh(mesh or MeshConfig(), None if mesh else first_device())
    if is_hf_folder(Path(path)):
        return _load_hf_folder(Path(path), step, devices, dtype)
    return _load_checkpoint(os.fspath(path), step, devices, dtype)


def _cast(dtype: DTypeLike | None, compute: ComputeConfig, mesh: Mesh) -> dict[str, Any]:
    """Returns the arguments that cast parameters as they are read. An explicit dtype is for all parameters."""
    return {"dtype": parameter_dtype(dtype, compute, mesh), "uncast": UNCAST if dtype is None else ()}


def parameter_dtype(dtype: DTypeLike | None, compute: ComputeConfig, mesh: Mesh) -> jnp.dtype | None:
    """Returns the dtype of the parameters on the devices of a mesh, or None to keep their stored dtypes.

    Raises:
      UserError: `dtype` is not one of the supported ones, or the devices cannot multiply in it.
    """
    platform = mesh.devices.flat[0].platform
    if dtype is None:
        # The dtype of the products depends on the platform of the mesh that is in use.
        with use_mesh(mesh):
            return None if platform == "cpu" else compute_dtype(compute)

    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        # Not a dtype: named in the error below, as the user wrote it.
        name = str(dtype)

    # TPUs do not support float16.
    known = [each for each in _DTYPES if platform != "tpu" or each != "float16"]
    if name not in known:
        lacks = f"a {platform.upper()} has no {name}" if name in _DTYPES else f"dtype {name!r} is not for parameters"
        raise UserError(f"{lacks}; choose {' or '.join(known)}")
    return jnp.dtype(dtype)


def _load_checkpoint(path: str, step: int | None, mesh: Mesh, dtype: DTypeLike | None) -> Loaded:
    """Loads a checkpoint of this package."""
    # The metadata alone, which is cheap, says what shapes to ask for. The step is chosen again below, because the
    # arrays of the latest one may be damaged.
    metadata = read_metadata(path, step)
    recipe = metadata.recipe()
    model = LoopLM(recipe.model, recipe.compute)
    cast = _cast(dtype, recipe.compute, mesh)

    check_divides(mesh, recipe.model)

    wanted = abstract_arrays(boxed_shapes(recipe.model), mesh)
    restored = restore_params(path, wanted, step=step, **cast)

    return Loaded(
        model=model,
        params=restored.state,
        mesh=mesh,
        # Of the step that was restored, which may be an older one than `metadata`.
        tokenizer=deserialize(restored.metadata.tokenizer_kind, restored.metadata.tokenizer),
        recipe=recipe,
        step=restored.step,
        warnings=tuple(str(step) for step in restored.skipped),
    )


def _load_hf_folder(path: Path, step: int | None, mesh: Mesh, dtype: DTypeLike | None) -> Loaded:
    """Loads a Hugging Face folder."""
    if step is not None:
        raise UserError(f"{path} is a Hugging Face folder, which has no steps; leave step out")

    found = load_hf(path, mesh=mesh, **_cast(dtype, ComputeConfig(), mesh))
    recipe = converted_recipe(path, found.config)

    return Loaded(
        model=LoopLM(recipe.model, recipe.compute),
        params=found.params,
        mesh=mesh,
        tokenizer=found.tokenizer,
        recipe=recipe,
        step=0,
        warnings=found.notes,
        origin=str(path),
    )
