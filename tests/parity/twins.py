"""The same random weights in our JAX and our PyTorch model, for small random configurations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from looplm_jax.config import ComputeConfig, Dtype, ModelConfig
from looplm_jax.convert._ouro_config import to_ouro_config
from looplm_jax.convert._state_dict import to_torch_state_dict
from looplm_jax.convert.torch_model.configuration_looplm import OuroConfig
from looplm_jax.convert.torch_model.modeling_looplm import OuroForCausalLM
from looplm_jax.models._looplm import LoopLM, Params, init_params

CASES = ("multi_head_T1", "multi_head_T4_tied", "grouped_T4", "grouped_T8_tied")
_OPTIONS = {
    "multi_head_T1": {"loops": 1},
    "multi_head_T4_tied": {"loops": 4, "tied_head": True},
    "grouped_T4": {"loops": 4, "num_kv_heads": 2},
    "grouped_T8_tied": {"loops": 8, "num_kv_heads": 1, "tied_head": True, "head_dim": 10},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twins:
    """A JAX model and a PyTorch model with the same parameters."""

    config: ModelConfig
    model: LoopLM
    params: Params
    torch_model: OuroForCausalLM

    def tokens(self, rows: int, length: int, seed: int = 0) -> np.ndarray:
        """Returns random token ids [rows, length]."""
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, (rows, length))


@functools.cache
def twins(case: str, dtype: Dtype = Dtype.FLOAT32) -> Twins:
    config = ModelConfig(
        **{
            "vocab_size": 61,
            "width": 32,
            "mlp_width": 48,
            "num_layers": 2,
            "num_heads": 4,
            "rope_theta": 1e4,
            "max_positions": 256,
            **_OPTIONS[case],
        }
    )
    shapes = jax.eval_shape(lambda: init_params(LoopLM(config), jax.random.key(0)))
    random = np.random.default_rng(len(case))
    # Every norm, bias and matrix matters, and the exit distribution covers all loops.
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.02, 0.25, leaf.shape), dtype.value), shapes)
    model = LoopLM(config, ComputeConfig(dtype=dtype))
    return Twins(config=config, model=model, params=params, torch_model=torch_twin(config, params, dtype))


def torch_twin(config: ModelConfig, params: Params, dtype: Dtype = Dtype.FLOAT32) -> OuroForCausalLM:
    """Returns a PyTorch model with these parameters, in evaluation mode."""
    published = to_ouro_config(config, dtype=dtype.value)
    for name in ("architectures", "auto_map", "torch_dtype"):
        del published[name]
    twin = OuroForCausalLM(OuroConfig(**published)).to(getattr(torch, dtype.value)).eval()
    twin.load_state_dict(to_torch_state_dict(params, config), strict=True)
    return twin
