"""Outputs of the official PyTorch code on a tiny model, and its weights with our names."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np

from looplm_jax.config import ModelConfig
from looplm_jax.models._looplm import Params

_DATA = pathlib.Path(__file__).parent.parent / "data"


@functools.cache
def golden_arrays() -> dict[str, np.ndarray]:
    with np.load(_DATA / "ouro_mha.npz") as arrays:
        return dict(arrays)


@functools.cache
def golden_config() -> ModelConfig:
    published = json.loads((_DATA / "ouro_mha.json").read_text())
    return ModelConfig(
        vocab_size=published["vocab_size"],
        width=published["hidden_size"],
        mlp_width=published["intermediate_size"],
        num_layers=published["num_hidden_layers"],
        num_heads=published["num_attention_heads"],
        num_kv_heads=published["num_key_value_heads"],
        loops=published["total_ut_steps"],
        rope_theta=published["rope_theta"],
        norm_eps=published["rms_norm_eps"],
        max_positions=published["max_position_embeddings"],
    )


@functools.cache
def golden_params() -> Params:
    config = golden_config()
    into_heads = (config.width, config.num_heads, config.head_width)

    def layers(name: str, shape: tuple[int, ...] = ()) -> jnp.ndarray:
        weights = [_weight(f"layers.{index}.{name}") for index in range(config.num_layers)]
        return jnp.stack([w.T.reshape(shape or w.T.shape) for w in weights])  # torch stores [out, in]

    return {
        "embedding": _weight("embed_tokens"),
        "head": jnp.asarray(golden_arrays()["w/lm_head.weight"]).T,
        "norm": {"scale": _weight("norm")},
        "gate": {
            "kernel": _weight("early_exit_gate")[0],
            "bias": jnp.asarray(golden_arrays()["w/model.early_exit_gate.bias"]),
        },
        "core": {
            "layers": {
                "attention": {
                    "query": {"kernel": layers("self_attn.q_proj", into_heads)},
                    "key": {"kernel": layers("self_attn.k_proj", into_heads)},
                    "value": {"kernel": layers("self_attn.v_proj", into_heads)},
                    "out": {"kernel": layers("self_attn.o_proj", (*into_heads[1:], config.width))},
                },
                "mlp": {name: {"kernel": layers(f"mlp.{name}_proj")} for name in ("gate", "up", "down")},
                "attention_norm": {"scale": layers("input_layernorm")},
                "attention_post_norm": {"scale": layers("input_layernorm_2")},
                "mlp_norm": {"scale": layers("post_attention_layernorm")},
                "mlp_post_norm": {"scale": layers("post_attention_layernorm_2")},
            }
        },
    }


def _weight(name: str) -> jnp.ndarray:
    return jnp.asarray(golden_arrays()[f"w/model.{name}.weight"])
