"""Maps each PyTorch tensor to a slice of one of our arrays, by the names in the released weights.

PyTorch has one matrix `[out, in]` per layer; our arrays are `[layers, in..., out...]`, with a separate axis for heads.
Nothing else differs. A model with norm placement `pre` has the tensor names of a Llama, plus an exit gate.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree

from looplm_jax.config import ModelConfig
from looplm_jax.errors import UserError, suggest
from looplm_jax.models._looplm import boxed_shapes

Path = tuple[str, ...]

# Arrays below have a leading axis of layers; PyTorch has one tensor for each layer.
_LAYERS: Path = ("core", "layers")
_VECTOR = 0  # no contracted axis: a vector or a table, kept as it is

# Our path -> the name in PyTorch, and how many leading axes of the matrix a product contracts.
_OUTSIDE_LAYERS: dict[Path, tuple[str, int]] = {
    ("embedding",): ("model.embed_tokens.weight", _VECTOR),
    ("norm", "scale"): ("model.norm.weight", _VECTOR),
    ("gate", "kernel"): ("model.early_exit_gate.weight", 1),
    ("gate", "bias"): ("model.early_exit_gate.bias", _VECTOR),
    ("head",): ("lm_head.weight", 1),
}
_IN_A_LAYER: dict[Path, tuple[str, int]] = {
    ("attention", "query", "kernel"): ("self_attn.q_proj.weight", 1),
    ("attention", "key", "kernel"): ("self_attn.k_proj.weight", 1),
    ("attention", "value", "kernel"): ("self_attn.v_proj.weight", 1),
    ("attention", "out", "kernel"): ("self_attn.o_proj.weight", 2),
    ("mlp", "gate", "kernel"): ("mlp.gate_proj.weight", 1),
    ("mlp", "up", "kernel"): ("mlp.up_proj.weight", 1),
    ("mlp", "down", "kernel"): ("mlp.down_proj.weight", 1),
    ("attention_norm", "scale"): ("input_layernorm.weight", _VECTOR),
    ("attention_post_norm", "scale"): ("input_layernorm_2.weight", _VECTOR),
    ("mlp_norm", "scale"): ("post_attention_layernorm.weight", _VECTOR),
    ("mlp_post_norm", "scale"): ("post_attention_layernorm_2.weight", _VECTOR),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchTensor:
    """One tensor of a PyTorch model, and its location in our parameters."""

    name: str
    path: Path  # path of the array in our tree
    layer: int | None  # index on the leading axis of that array; None if it has no such axis
    our_shape: tuple[int, ...]  # shape of the slice, without the axis of layers
    contracted: int  # number of leading axes that a product contracts; 0 for vectors and the embedding

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape in PyTorch: `[out, in]` for a matrix."""
        if self.contracted == _VECTOR:
            return self.our_shape
        return math.prod(self.our_shape[self.contracted :]), math.prod(self.our_shape[: self.contracted])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns our slice in PyTorch's layout, as a view."""
        # [in..., out...] -> [in, out] -> [out, in]
        return array if self.contracted == _VECTOR else array.reshape(self.shape[::-1]).T

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a PyTorch tensor in our layout, as a view: the inverse of `to_torch`."""
        # [out, in] -> [in, out] -> [in..., out...]
        return tensor if self.contracted == _VECTOR else tensor.T.reshape(self.our_shape)


# The layout of a model


def array_shapes(config: ModelConfig) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns the shapes of our parameters for a model, without allocating them."""
    return nn.meta.unbox(boxed_shapes(config))


def torch_layout(params: PyTree) -> Iterator[TorchTensor]:
    """Yields every PyTorch tensor of a model, layer by layer.

    Args:
      params: our parameters, or their shapes: anything whose leaves have a `shape`.

    Raises:
      UserError: the model has a part that the PyTorch model lacks (prelude, coda, injection); the message names it.
    """
    flat = flat_arrays(params)
    for path in flat:
        if path not in _OUTSIDE_LAYERS and (path[:2] != _LAYERS or path[2:] not in _IN_A_LAYER):
            raise UserError(
                f"parameters {'.'.join(path)} have no place in a PyTorch Ouro model; it cannot be converted"
            )

    for path, (name, contracted) in _OUTSIDE_LAYERS.items():
        if path in flat:
            shape = tuple(flat[path].shape)
            yield TorchTensor(name=name, path=path, layer=None, our_shape=shape, contracted=contracted)

    stacked = {path: leaf for path, leaf in flat.items() if path[:2] == _LAYERS}
    # All arrays of the stack have the same number of layers.
    for layer in range(next(iter(stacked.values())).shape[0]):
        for path, leaf in stacked.items():
            name, contracted = _IN_A_LAYER[path[2:]]
            yield TorchTensor(
                name=f"model.layers.{layer}.{name}",
                path=path,
                layer=layer,
                our_shape=tuple(leaf.shape[1:]),
                contracted=contracted,
            )


def flat_arrays(params: PyTree) -> dict[Path, Any]:
    """Returns the leaves of a parameter tree, which may be abstract, keyed by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def unflat_arrays(arrays: Mapping[Path, Any]) -> PyTree:
    """Returns the parameter tree of leaves keyed by path: the inverse of `flat_arrays`."""
    tree: dict = {}
    for path, leaf in arrays.items():
        parent = tree
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        parent[path[-1]] = leaf
    return tree


# Prefixes that a wrapper added to the names when the model was saved, and how to save the model without it.
_WRAPPERS = {
    "_orig_mod.": "torch.compile; save model._orig_mod",
    "base_model.model.": "PEFT; save model.merge_and_unload()",
    "_fsdp_wrapped_module.": "FSDP; save its full state dict",
    "_checkpoint_wrapped_module.": "activation checkpointing; save the model without it",
    "_forward_module.": "a training framework; save the model inside it",
    "module.": "DataParallel or DistributedDataParallel; save model.module",
}


def refuse_wrappers(names: Iterable[str], where: str) -> None:
    """Refuses tensors whose names were changed by a wrapper.

    Raises:
      UserError: a name has the prefix of a wrapper; the message explains how to save the model without it.
    """
    for name in names:
        for part, what in _WRAPPERS.items():
            # With a leading dot, "module." matches only a complete component of a name.
            if f".{part}" in f".{name}":
                raise UserError(f"{where}: tensor {name} has {part!r} in its name, from {what}, or rename the tensors")


# Checking tensors against the layout


def check_tensor_names(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, TorchTensor], where: str) -> None:
    """Refuses tensors that are missing, unexpected or misshapen.

    Args:
      found: the shape of every tensor that exists.
      wanted: the tensors of the model, by name.
      where: the name of the source in messages.

    Raises:
      UserError: a tensor does not match; the message names it.
    """
    # A wrapper changes all names, so it explains more than the first unknown one.
    refuse_wrappers(found, where)

    for name in found:
        if name not in wanted:
            hint = suggest(name, wanted, otherwise="")
            raise UserError(f"{where}: tensor {name} is not part of the model{hint}")

    for name, tensor in wanted.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing")
        if tuple(found[name]) != tensor.shape:
            raise UserError(
                f"{where}: tensor {name} has shape {list(found[name])}, the model needs {list(tensor.shape)}"
            )
