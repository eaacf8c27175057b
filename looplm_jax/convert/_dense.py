"""Starts a looped model from a dense model with Llama's layout (SmolLM2, Llama 3, Mistral).

The dense layers become the shared stack. With norm placement `pre`, a loop is the dense model itself: the hidden states
and logits of loop 1 are the same numbers. `sandwich` adds a norm after each branch, and no weight makes that norm the
identity, so loop 1 differs until training recovers it. Small weights in these norms recover it sooner, at every loop
(docs/dense_start.md has the measurement). A dense model has no exit gate, so the gate starts at its initial value.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from looplm_jax.config import MeshConfig, ModelConfig, NormPlacement
from looplm_jax.convert._import_hf import (
    CONFIG,
    Converted,
    HfModel,
    conversion_report,
    converted_recipe,
    match_tensors,
    parameter_targets,
    read_hf_tokenizer,
    require_tokenizer,
    with_folder,
    write_converted,
)
from looplm_jax.convert._layout import Path as ArrayPath
from looplm_jax.convert._layout import TorchTensor, flat_arrays, unflat_arrays
from looplm_jax.convert._ouro_config import from_llama_config
from looplm_jax.convert._placement import place_tensors
from looplm_jax.convert._safetensors_io import WeightFolder
from looplm_jax.errors import UserError
from looplm_jax.files import staged_folder
from looplm_jax.json_io import read_json_object
from looplm_jax.models._looplm import LoopLM, boxed_params
from looplm_jax.random_keys import seeded_key
from looplm_jax.sharding import check_divides, first_device, make_mesh

_DESCRIPTION = "starts from the weights of a dense model"
# The gate, and the norms after the branches.
_ONLY_LOOPED = re.compile(r"model\.early_exit_gate\.|.*layernorm_2\.")
_SECOND_NORMS = {"attention_post_norm", "mlp_post_norm"}
_DERIVED = ".rotary_emb.inv_freq"  # stored in old files; it follows from rope_theta

# The values that transformers assumes for omitted fields, where they differ from those our reader assumes.
_ASSUMED: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1e4},
    "mistral": {"rope_theta": 1e4, "num_key_value_heads": 8, "sliding_window": 4096},
}


def convert_from_dense(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    loops: int = 4,
    norm_placement: NormPlacement = NormPlacement.PRE,
    second_norm: float = 1.0,
    dtype: DTypeLike | None = None,
    seed: int = 0,
) -> Converted:
    """Writes a looped model that starts from the weights of a dense one, as the checkpoint `<out>/checkpoints/0`.

    Args:
      folder: a folder with config.json, safetensors and tokenizer.json of a model with Llama's layout.
      out: a folder that does not exist, or is empty.
      loops: T of the looped model.
      norm_placement: `pre` keeps the dense model as loop 1; `sandwich` is Ouro's placement.
      second_norm: the initial weight of the norms after the branches of `sandwich`; below one, a loop changes the state
        less.
      dtype: dtype of the parameters; None keeps the stored dtype.
      seed: the seed for the exit gate.

    Raises:
      UserError: as `load_dense`, or `out` is not empty, or the file system refuses a write. No partial output remains.
    """
    mesh = make_mesh(MeshConfig(), first_device())

    with staged_folder(out) as staging:
        model = load_dense(
            folder,
            mesh=mesh,
            loops=loops,
            norm_placement=norm_placement,
            second_norm=second_norm,
            dtype=dtype,
            seed=seed,
        )

        recipe = dataclasses.replace(converted_recipe(Path(folder), model.config), description=_DESCRIPTION)
        write_converted(staging, recipe, model.params, require_tokenizer(model.tokenizer, folder))
    return conversion_report(Path(out), model.config, model.params, model.notes)


def load_dense(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh,
    loops: int = 4,
    norm_placement: NormPlacement = NormPlacement.PRE,
    second_norm: float = 1.0,
    dtype: DTypeLike | None = None,
    seed: int = 0,
) -> HfModel:
    """Returns a looped model with the weights of a dense one. Reads as `load_hf`; arguments as in `convert_from_dense`.

    Raises:
      UserError: anything that `load_hf` refuses, and a model with biases (Qwen 2), a sliding window (Mistral before
        0.2) or a scaled rotary embedding (Llama 3.1); the message names the field.
    """
    _check_norms(second_norm, norm_placement)

    folder = Path(path)
    # Before the check that every tensor has a place in the model.
    weights = _without_derived(WeightFolder.open(folder))
    config = read_dense_config(folder, weights, loops=loops, norm_placement=norm_placement)
    check_divides(mesh, config)

    layout = match_tensors(weights, config, _is_in_llama)
    tokenizer, notes = read_hf_tokenizer(folder, config.vocab_size)

    dtype = dtype or weights.common_dtype(tensor.name for tensor in layout)
    targets = parameter_targets(config, mesh, dtype)
    arrays = place_tensors(weights, layout, targets)

    # A dense model has neither a gate nor, for `sandwich`, second norms.
    missing = {path: target for path, target in targets.items() if path not in arrays}
    params = unflat_arrays({**arrays, **_initial(config, missing, second_norm, seed)})

    return HfModel(config=config, params=params, tokenizer=tokenizer, notes=notes)


# The configuration of the dense model


def read_dense_config(folder: Path, weights: WeightFolder, *, loops: int, norm_placement: NormPlacement) -> ModelConfig:
    """Returns the looped model that the `config.json` of a dense model describes.

    Raises:
      UserError: the file is missing or is not a JSON object, the model has biases or a layout other than Llama's, or
        the config has a field that is not supported; the message names it.
    """
    if loops < 1:
        raise UserError(f"loops must be at least 1, not {loops}")

    values = read_json_object(folder / CONFIG)

    # It would convert, because an Ouro has all tensors of a Llama, but its gate and second norms would be lost.
    if values.get("model_type") == "ouro":
        raise UserError(f"{folder} holds a looped model already; convert it as one: looplm convert from-hf")
    _refuse_biases(weights, values)
    try:
        return from_llama_config(_as_llama(values), loops=loops, norm_placement=norm_placement)
    except UserError as error:
        raise with_folder(folder, error) from None


def _as_llama(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields as a Llama's, with omitted ones filled in.

    A Mistral without a window is a Llama by another name.
    """
    # Other kinds are passed on as they are, and refused by the reader, with their name.
    kind = values.get("model_type")
    if kind not in ("llama", "mistral"):
        return dict(values)
    unread = {"use_sliding_window"} if kind == "mistral" else set()  # a Mistral ignores this field
    given = {name: value for name, value in values.items() if name not in unread}
    return {**_ASSUMED[kind], **given, "model_type": "llama"}


# Its tensors, and those that it lacks


def _is_in_llama(tensor: TorchTensor) -> bool:
    """Whether a dense Llama has this tensor."""
    return not _ONLY_LOOPED.match(tensor.name)


def _refuse_biases(weights: WeightFolder, values: Mapping[str, Any]) -> None:
    """Raises UserError if the model has biases, which would be lost."""
    biases = [name for name in weights.tensors if name.endswith(".bias")]
    # Configurations of Qwen 2 do not mention their biases.
    if biases or values.get("model_type") == "qwen2":
        example = biases[0] if biases else "self_attn.q_proj.bias, k_proj.bias and v_proj.bias of a Qwen 2"
        raise UserError(
            f"{weights.path}: a LoopLM has no biases, so {example} would be lost; take a model without, such as SmolLM2"
        )


def _without_derived(weights: WeightFolder) -> WeightFolder:
    """Returns the weights without tensors that are derived from the configuration."""
    kept = {name: stored for name, stored in weights.tensors.items() if not name.endswith(_DERIVED)}
    return WeightFolder(path=weights.path, tensors=kept)


def _check_norms(value: float, norm_placement: NormPlacement) -> None:
    if norm_placement not in (NormPlacement.PRE, NormPlacement.SANDWICH):
        raise UserError(f"norm placement {norm_placement.value} is not that of a dense model; use pre or sandwich")
    if not 0 < value < math.inf:
        raise UserError(f"second_norm must be a positive number, not {value}")
    if value != 1 and norm_placement is NormPlacement.PRE:
        raise UserError(f"second_norm={value} needs norm placement sandwich: pre has no second norms")


def _initial(
    config: ModelConfig, targets: Mapping[ArrayPath, jax.ShapeDtypeStruct], second_norm: float, seed: int
) -> dict[ArrayPath, Array]:
    """Returns initial values for some parameters. The compiler removes the others, so only these are computed."""

    def make(key: Array) -> dict[ArrayPath, Array]:
        # Initialized as in a new model.
        everything = flat_arrays(nn.meta.unbox(boxed_params(LoopLM(config), key)))
        # Norms start at one, so the product is second_norm.
        scales = {path: 1.0 if _SECOND_NORMS.isdisjoint(path) else second_norm for path in targets}
        return {path: (scales[path] * everything[path]).astype(target.dtype) for path, target in targets.items()}

    shardings = {path: target.sharding for path, target in targets.items()}

    return jax.jit(make, out_shardings=shardings)(seeded_key(seed))
