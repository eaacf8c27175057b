"""The PyTorch model with the golden weights, and with small random ones."""

import functools
import json
import pathlib

import numpy as np
import torch

from looplm_jax.convert.torch_model.configuration_looplm import OuroConfig
from looplm_jax.convert.torch_model.modeling_looplm import OuroForCausalLM

_DATA = pathlib.Path(__file__).parent.parent / "data"
_NOT_FIELDS = {"transformers", "torch"}


@functools.cache
def golden() -> dict[str, torch.Tensor]:
    """Returns inputs, weights (under "w/") and outputs of the official code."""
    with np.load(_DATA / "ouro_mha.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def golden_config(**overrides) -> OuroConfig:
    """Returns the config of the golden file, which also names the versions that produced it."""
    published = json.loads((_DATA / "ouro_mha.json").read_text())
    fields = {name: value for name, value in published.items() if name not in _NOT_FIELDS}
    return OuroConfig(**{**fields, **overrides})


def golden_model(**overrides) -> OuroForCausalLM:
    """Returns a new model with the golden weights, in evaluation mode."""
    model = OuroForCausalLM(golden_config(**overrides))
    model.load_state_dict({name[2:]: value for name, value in golden().items() if name.startswith("w/")})
    return model.eval()


def tiny_model(seed: int = 0, spread: float = 0.1, **overrides) -> OuroForCausalLM:
    """Returns a model with random weights, in evaluation mode; with a `spread` of 0.3 exits vary between tokens."""
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(seed)
    return OuroForCausalLM(OuroConfig(**{**shape, **heads, "initializer_range": spread, **overrides})).eval()


def random_ids(rows: int, columns: int, seed: int = 1, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(3, vocab_size, (rows, columns), generator=torch.Generator().manual_seed(seed))
