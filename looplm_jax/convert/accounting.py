"""Matches the tensors of weight files with those of a model, before the first tensor is read."""

import re
from collections.abc import Callable

import numpy as np

from looplm_jax.config import ModelConfig
from looplm_jax.convert.layout import TorchTensor, account, array_shapes, refuse_wrappers, torch_layout
from looplm_jax.convert.weight_files import WeightFolder
from looplm_jax.errors import UserError

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def accounted(
    weights: WeightFolder, config: ModelConfig, has: Callable[[TorchTensor], bool] = lambda _: True
) -> list[TorchTensor]:
    """Returns the tensors of the model if the files hold exactly these, in these shapes.

    Args:
      weights: the files.
      config: the configuration of the model.
      has: whether a tensor exists in the kind of model that the files hold.

    Raises:
      UserError: a tensor is missing, unexpected or misshapen; the message names it.
    """
    refuse_wrappers(weights.tensors, str(weights.path))
    _check_sizes(weights, config)

    layout = [tensor for tensor in torch_layout(array_shapes(config)) if has(tensor)]
    found = {name: stored.shape for name, stored in weights.tensors.items()}

    # Some files of tied models hold the head as well.
    head_too = config.tied_head and found.pop(_HEAD, None) is not None

    account(found, {tensor.name: tensor for tensor in layout}, str(weights.path))
    if head_too:
        _check_tied(weights)

    return layout


def _check_sizes(weights: WeightFolder, config: ModelConfig) -> None:
    """Refuses a config that does not fit the headers of the files, before anything of its size is allocated.

    Headers are bounded by the lengths of their files, so a config that agrees with them asks for no more memory than
    the files themselves take.

    Raises:
      UserError: the number of layers or the shape of a tensor differs.
    """
    found = {match[1] for name in weights.tensors if (match := _LAYER.match(name))}
    if len(found) != config.num_layers:
        asked = f"num_hidden_layers={config.num_layers}"
        raise UserError(f"{weights.path}: config.json says {asked}, but the files hold {len(found)} layers")

    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    # These four tensors determine every size in the configuration.
    needed = {
        _EMBEDDING: (config.vocab_size, config.width),
        f"{attention}.q_proj.weight": (config.num_heads * config.head_width, config.width),
        f"{attention}.k_proj.weight": (config.kv_heads * config.head_width, config.width),
        f"{mlp}.gate_proj.weight": (config.mlp_width, config.width),
    }

    for name, shape in needed.items():
        if name not in weights.tensors:
            raise UserError(f"{weights.path}: tensor {name} is missing")
        if weights.tensors[name].shape != shape:
            raise UserError(
                f"{weights.path}: tensor {name} has shape {list(weights.tensors[name].shape)}, "
                f"config.json asks for {list(shape)}"
            )


def _check_tied(weights: WeightFolder) -> None:
    """Raises UserError unless the head of a tied model equals the embedding bit for bit. Some files store both."""
    head, embedding = weights.tensors[_HEAD], weights.tensors[_EMBEDDING]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    # Compared as bytes: NaNs would never be equal.
    if not same or not np.array_equal(weights.read(_HEAD).view(np.uint8), weights.read(_EMBEDDING).view(np.uint8)):
        raise UserError(
            f"{weights.path}: {_HEAD} differs from {_EMBEDDING}, but config.json says tie_word_embeddings=true; "
            "set it to false to keep both"
        )
