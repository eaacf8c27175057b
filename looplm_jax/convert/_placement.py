"""Matches the tensors of weight files with the arrays of a model, and reads them onto the devices that hold them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from looplm_jax.config import ModelConfig
from looplm_jax.convert._layout import (
    Path,
    TorchTensor,
    array_shapes,
    check_tensor_names,
    refuse_wrappers,
    torch_layout,
)
from looplm_jax.convert._safetensors_io import WeightFolder
from looplm_jax.errors import UserError

_COLUMNS = 16  # columns copied at a time: a transposed copy in blocks that fit the cache takes a third of the time
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Matches the number of a layer in the name of a tensor.
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


# Matching, before the first tensor is read


def match_tensors(
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
    has_head = config.tied_head and found.pop(_HEAD, None) is not None

    check_tensor_names(found, {tensor.name: tensor for tensor in layout}, str(weights.path))
    if has_head:
        check_tied(weights, _HEAD, _EMBEDDING, "tie_word_embeddings")

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


def check_tied(weights: WeightFolder, head_name: str, embedding_name: str, field: str) -> None:
    """Raises UserError unless the head of a tied model equals the embedding bit for bit. Some files store both."""
    head, embedding = weights.tensors[head_name], weights.tensors[embedding_name]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    # Compared as bytes: NaNs would never be equal.
    if not same or not np.array_equal(
        weights.read(head_name).view(np.uint8), weights.read(embedding_name).view(np.uint8)
    ):
        raise UserError(
            f"{weights.path}: {head_name} differs from {embedding_name}, but config.json says {field}=true; "
            "set it to false to keep both"
        )


# Placing


def place_tensors(
    weights: WeightFolder, layout: Iterable[TorchTensor], targets: Mapping[Path, jax.ShapeDtypeStruct]
) -> dict[Path, Array]:
    """Returns our arrays. Each is filled from its tensors and placed on its devices before the next one starts.

    In addition to the finished arrays, memory holds one array and one tensor. The array that needs the most memory
    comes first, while few others exist.

    Args:
      weights: the files of the tensors; each tensor is read once.
      layout: the tensors of the arrays, all present and of the right shapes (see `match_tensors`).
      targets: shape, dtype and sharding of every array; the axis of layers is not sharded.

    Raises:
      UserError: a tensor has a value that is not finite in the dtype of its array; the message names the tensor.
    """
    parts: dict[Path, list[TorchTensor]] = {}
    for tensor in layout:
        parts.setdefault(tensor.path, []).append(tensor)

    def memory(path: Path) -> int:
        read = max(weights.tensors[tensor.name].nbytes for tensor in parts[path])
        return targets[path].size * targets[path].dtype.itemsize + 2 * read  # once in the mapped file, once as a copy

    return {path: _place(weights, parts[path], targets[path]) for path in sorted(parts, key=memory, reverse=True)}


def _place(weights: WeightFolder, tensors: list[TorchTensor], target: jax.ShapeDtypeStruct) -> Array:
    """Returns one array, assembled in one host buffer for each distinct shard."""
    # Replicas have equal indices, so they share a buffer. Slices are not hashable before Python 3.12, their repr is.
    indices = {repr(index): index for index in target.sharding.addressable_devices_indices_map(target.shape).values()}
    shape = target.sharding.shard_shape(target.shape)
    shards = {key: np.empty(shape, target.dtype) for key in indices}

    for tensor in tensors:
        whole = tensor.to_ours(_read(weights, tensor.name, target.dtype))
        for key, index in indices.items():
            if tensor.layer is None:
                _copy(shards[key], whole[index])
            else:
                # index[0] selects layers, which are not sharded.
                _copy(shards[key][tensor.layer], whole[index[1:]])

    array = jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: shards[repr(index)], dtype=target.dtype
    )
    return array.block_until_ready()  # the buffers are free after this, unless they became the array


def _read(weights: WeightFolder, name: str, dtype: Any) -> np.ndarray:
    """Returns a tensor in `dtype`. Raises UserError if a value is not finite in it."""
    stored = weights.tensors[name]
    with np.errstate(all="ignore"):  # overflow in a narrower dtype is detected below
        tensor = weights.read(name).astype(dtype, copy=False)

    # A value is not finite if all bits of its exponent are set.
    infinity = np.array(np.inf, dtype).view(f"u{tensor.itemsize}")  # all exponent bits set
    bits = tensor.view(infinity.dtype)
    if np.max(bits & infinity, initial=0) == infinity:
        raise UserError(f"{stored.file}: tensor {name} holds NaN, or a number that is infinite in {np.dtype(dtype)}")
    return tensor


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    for start in range(0, source.shape[-1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        target[..., columns] = source[..., columns]
