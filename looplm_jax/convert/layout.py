"""Which PyTorch tensor is which slice of which of our arrays, by the names of the released weights.

PyTorch keeps one matrix `[out, in]` for each layer; we keep `[layers, in..., out...]`, with heads as an axis of their
own. Nothing else differs. A model with norm placement `pre` has the names of a Llama, and a gate besides.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree

from looplm_jax.config import ModelConfig
from looplm_jax.errors import UserError, suggest
from looplm_jax.models.looplm import boxed_shapes

Path = tuple[str, ...]

_LAYERS: Path = ("core", "layers")
_VECTOR = 0  # no axis is multiplied away: a vector or a table, kept as it is

# Our path -> the name in PyTorch, and how many leading axes a product with the matrix multiplies away.
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
    """One tensor of a PyTorch model, and its place in ours."""

    name: str
    path: Path  # of the array in our tree
    layer: int | None  # index on the leading axis of that array; None where it has no such axis
    our_shape: tuple[int, ...]  # of the slice, without the axis of layers
    contracted: int  # leading axes that a product multiplies away; 0 for vectors and the embedding

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in PyTorch: `[out, in]` for a matrix."""
        if self.contracted == _VECTOR:
            return self.our_shape
        return math.prod(self.our_shape[self.contracted :]), math.prod(self.our_shape[: self.contracted])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Our slice as PyTorch keeps it; a view."""
        return array if self.contracted == _VECTOR else array.reshape(self.shape[::-1]).T

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse of `to_torch`."""
        return tensor if self.contracted == _VECTOR else tensor.T.reshape(self.our_shape)


def array_shapes(config: ModelConfig) -> PyTree[jax.ShapeDtypeStruct]:
    """Our parameters of such a model as shapes, without making any."""
    return nn.meta.unbox(boxed_shapes(config))


def torch_layout(params: PyTree) -> Iterator[TorchTensor]:
    """Every PyTorch tensor of a model, layer after layer.

    Args:
      params: our parameters, or their shapes: anything whose leaves have a `shape`.

    Raises:
      UserError: a part that the PyTorch model lacks (prelude, coda, injection), by name.
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


def flat_arrays(params: PyTree) -> dict[Path, jax.Array]:
    """The leaves of a tree of parameters by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def unflat_arrays(arrays: Mapping[Path, jax.Array]) -> PyTree:
    """The inverse of `flat_arrays`."""
    tree: dict = {}
    for path, leaf in arrays.items():
        parent = tree
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        parent[path[-1]] = leaf
    return tree


# Parts of names that come from what was wrapped around the model when it was saved, and how to save it without.
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
      UserError: one of them, the wrapper, and how to save the model without it.
    """
    for name in names:
        for part, what in _WRAPPERS.items():
            if f".{part}" in f".{name}":
                raise UserError(f"{where}: tensor {name} has {part!r} in its name, from {what}, or rename the tensors")


def account(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, TorchTensor], where: str) -> None:
    """Refuse tensors that are missing, surplus or of another shape.

    Args:
      found: the shape of every tensor that is there.
      wanted: the tensors of the model, by name.
      where: what to call the place in a message.

    Raises:
      UserError: one of them, by name.
    """
    refuse_wrappers(found, where)
    for name in found:
        if name not in wanted:
            hint = suggest(name, wanted, otherwise="")
            raise UserError(f"{where}: tensor {name} belongs to no part of the model{hint}")
    for name, tensor in wanted.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing")
        if tuple(found[name]) != tensor.shape:
            raise UserError(
                f"{where}: tensor {name} has shape {list(found[name])}, the model needs {list(tensor.shape)}"
            )
