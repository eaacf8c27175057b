"""Converts parameters to a plain PyTorch state dict and back, without transformers."""

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from looplm_jax.config import ModelConfig, NormPlacement
from looplm_jax.convert._layout import array_shapes, check_tensor_names, flat_arrays, torch_layout, unflat_arrays
from looplm_jax.convert._ouro_config import check_is_ouro
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import Params

if TYPE_CHECKING:
    import torch

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def to_torch_state_dict(params: Params, config: ModelConfig) -> dict[str, "torch.Tensor"]:
    """Returns the tensors of a PyTorch Ouro model, on the CPU, in the dtype of `params`.

    With `norm_placement=pre`, the tensors are those of a Llama and an exit gate. A model with a tied head has its
    embedding under both names, as in the state dict of the PyTorch module.

    Raises:
      UserError: PyTorch is not installed, or the model has an option that the PyTorch model lacks, which is named.
    """
    torch = _import_torch()
    _check_options(config)

    layout, arrays = list(torch_layout(params)), flat_arrays(params)
    # Each array is fetched once, not once for each of its layers.
    on_host = {path: np.asarray(array) for path, array in arrays.items()}

    state = {}
    for tensor in layout:
        whole = on_host[tensor.path]
        state[tensor.name] = _to_tensor(torch, tensor.to_torch(whole if tensor.layer is None else whole[tensor.layer]))

    return state if _HEAD in state else {**state, _HEAD: state[_EMBEDDING]}


def from_torch_state_dict(state: Mapping[str, "torch.Tensor"], config: ModelConfig) -> Params:
    """Returns the parameters of a model of shape `config` from the tensors of a PyTorch Ouro model, in their own dtype.

    Raises:
      UserError: a tensor is missing, unexpected or of another shape, or the model has an option that the PyTorch model
        lacks; the message names it.
    """
    torch = _import_torch()
    _check_options(config)
    shapes = array_shapes(config)
    wanted = {tensor.name: tensor for tensor in torch_layout(shapes)}

    # The state dict of a tied model lists the embedding a second time, as the head.
    tensors = dict(state)
    if config.tied_head and {_HEAD, _EMBEDDING} <= set(tensors) and torch.equal(tensors[_HEAD], tensors[_EMBEDDING]):
        del tensors[_HEAD]

    check_tensor_names({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted, "state dict")

    # The slices of one array arrive in the order of its layers, because the layout lists the layers in order.
    slices: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, place in wanted.items():
        slices.setdefault(place.path, []).append(place.to_ours(_to_numpy(torch, tensors[name])))

    arrays = {
        path: jnp.asarray(np.stack(slices[path]) if leaf.ndim > slices[path][0].ndim else slices[path][0])
        for path, leaf in flat_arrays(shapes).items()
    }
    return unflat_arrays(arrays)


def _check_options(config: ModelConfig) -> None:
    """Raises UserError for an option of the model that the PyTorch model lacks."""
    # The norms of `pre` are a subset of Ouro's, with the names that they have in a Llama.
    check_is_ouro(config, except_for=["norm_placement"] if config.norm_placement is NormPlacement.PRE else [])


def _to_tensor(torch: ModuleType, array: np.ndarray) -> "torch.Tensor":
    """Returns a copy as a PyTorch tensor. PyTorch accepts NumPy's bfloat16 only as bits."""
    # torch.from_numpy shares memory, and JAX's host arrays are read-only.
    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(torch: ModuleType, tensor: "torch.Tensor") -> np.ndarray:
    """Returns a NumPy array with the tensor's values; bfloat16 passes through its bits, which NumPy can hold."""
    # NumPy reads neither tensors that require gradients nor those on other devices.
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(jax.dtypes.bfloat16)
    return tensor.numpy()


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError("this needs PyTorch; pip install 'looplm_jax[torch]'") from None
    return torch
