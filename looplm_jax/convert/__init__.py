"""Conversion of weights: Hugging Face folders, PyTorch state dicts, deeper stacks, and dense models."""

from looplm_jax.convert._dense import convert_from_dense
from looplm_jax.convert._export_hf import convert_to_hf
from looplm_jax.convert._import_hf import convert_from_hf
from looplm_jax.convert._safetensors_io import parse_size
from looplm_jax.convert._state_dict import from_torch_state_dict, to_torch_state_dict
from looplm_jax.convert._upcycle import Order, upcycle

__all__ = [
    "Order",
    "convert_from_dense",
    "convert_from_hf",
    "convert_to_hf",
    "from_torch_state_dict",
    "parse_size",
    "to_torch_state_dict",
    "upcycle",
]
