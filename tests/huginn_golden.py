"""Outputs of Huginn's published code (seal-rg/recurrent-pretraining, commit 59e0b69b) on a tiny model, in float32.

`huginn_tiny.npz` holds `w/*`, the weights by their published names; `tokens` and `labels`; `initial_state`, the state
before loop 1; `prelude`, the embedded input; `states` after each of 8 loops, from the initial one on; `latent_states`,
what the coda reads after loop 8; `hidden` and `logits` of 1 to 8 loops, and `logits_r16` to `logits_r64`; `grad_n_k/*`,
the loss and gradients with n loops without gradient and k with it; `decode/full/ids`, greedy decoding of six tokens
after the first five, from a zero state.
"""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from looplm_jax.config import (
    GatePlacement,
    Initializer,
    InitialState,
    Injection,
    ModelConfig,
    NormPlacement,
    StateNorm,
)
from looplm_jax.convert._tokenizer_files import tokenizer_files
from looplm_jax.data.tokenizers import END_OF_TEXT, SymbolTokenizer
from looplm_jax.models._looplm import Params

_FILE = pathlib.Path(__file__).parent / "data" / "huginn_tiny.npz"
WIDTH, HEADS, HEAD_WIDTH, MLP = 32, 4, 8, 56
CONFIG = ModelConfig(
    vocab_size=96,
    width=WIDTH,
    mlp_width=MLP,
    num_layers=4,
    num_heads=HEADS,
    loops=8,
    prelude_layers=2,
    coda_layers=2,
    injection=Injection.LINEAR,
    initial_state=InitialState.NOISE,
    state_norm=StateNorm.READOUT,
    shared_readout_norm=True,
    gate=GatePlacement.NONE,
    rope_theta=50000.0,
    norm_placement=NormPlacement.OUTER,
    qk_bias=True,
    tied_head=True,
    embedding_scale=WIDTH**0.5,
    max_positions=64,
    initializer=Initializer.SCALED_BY_DEPTH,
    init_std=(2 / (5 * WIDTH)) ** 0.5,
)


@functools.cache
def huginn_arrays() -> dict[str, np.ndarray]:
    with np.load(_FILE) as arrays:
        return dict(arrays)


def huginn_ring_logits(planes: int) -> np.ndarray:
    """Returns the logits of the same decoding, [6, V], with a cache that keeps the last `planes` loops of a token.

    The published name of this cache is `latest-m4-compress-s<4 * planes>`, by layers instead of loops.
    """
    with np.load(_FILE.with_name("huginn_caches.npz")) as arrays:
        return arrays[f"decode/{planes}"]


def huginn_params(prefix: str = "w/") -> Params:
    """Returns the published weights, or gradients of them, with our names and in our order of rotary pairs."""
    arrays = {name.removeprefix(prefix): array for name, array in huginn_arrays().items() if name.startswith(prefix)}
    stacks = {"prelude": 2, "core_block": 4, "coda": 2}
    params = {name.removesuffix("_block"): _stack(arrays, name, length) for name, length in stacks.items()}
    return {
        **params,
        "embedding": jnp.asarray(arrays["transformer.wte.weight"]),
        "injection": jnp.asarray(arrays["transformer.adapter.weight"].T),
        "norm": {"scale": jnp.asarray(arrays["transformer.ln_f.weight"])},
    }


def _stack(arrays, stack, length):
    def of_layers(name, convert=np.asarray):
        return jnp.stack([convert(arrays[f"transformer.{stack}.{layer}.{name}"]) for layer in range(length)])

    def heads(part):
        """Returns one of q, k and v as [D, H, Dh]; pairs (2i, 2i+1) of q and k become (i, i + Dh/2)."""

        def convert(fused):
            rows = fused.reshape(3, HEADS, HEAD_WIDTH, WIDTH)[part]
            return np.moveaxis(rows if part == 2 else _halves(rows, 1), 2, 0)

        return {"kernel": of_layers("attn.Wqkv.weight", convert)}

    def bias(part):
        return {"bias": of_layers("attn.qk_bias", lambda both: _halves(both[part, 0], 1))}

    norms = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
    return {
        "layers": {
            "attention": {
                "query": heads(0) | bias(0),
                "key": heads(1) | bias(1),
                "value": heads(2),
                "out": {
                    "kernel": of_layers("attn.proj.weight", lambda w: w.T.reshape(HEADS, HEAD_WIDTH, WIDTH)),
                },
            },
            "mlp": {
                "gate": {"kernel": of_layers("mlp.fc.weight", lambda w: w[:MLP].T)},
                "up": {"kernel": of_layers("mlp.fc.weight", lambda w: w[MLP:].T)},
                "down": {"kernel": of_layers("mlp.proj.weight", np.transpose)},
            },
            **{name: {"scale": of_layers(f"norm_{number}.weight")} for number, name in enumerate(norms, 1)},
        }
    }


def _halves(array, axis):
    """Returns the even entries of an axis, then the odd ones."""
    return np.concatenate([array.take(range(start, array.shape[axis], 2), axis) for start in (0, 1)], axis)


# The golden model as a folder

SYMBOLS = SymbolTokenizer((END_OF_TEXT, *(f"word{n}" for n in range(95))))
# `config.json` of the folder whose outputs are the golden arrays.
PUBLISHED = {
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "n_embd": 32,
    "n_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_layers": 8,
    "block_size": 64,
    "vocab_size": 96,
    "padded_vocab_size": 96,
    "padding_multiple": 1,
    "tie_embeddings": True,
    "intermediate_size": 56,
    "bias": False,
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-06,
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "state_init": "like-init",
    "injection_type": "linear",
    "n_layers_in_recurrent_block": 4,
    "mean_recurrence": 8,
    "sampling_scheme": "poisson-lognormal-filling",
    "mean_backprop_depth": 3,
    "n_layers_in_prelude": 2,
    "n_layers_in_coda": 2,
    "qk_bias": True,
    "rope_base": 50000.0,
    "test_time_noise": 0,
    "test_time_noise_type": "fixed",
}


def write_folder(path, *, dtype=np.float32, values=PUBLISHED, changes=None):
    """Writes the golden model as a folder; returns its tensors. A change to None removes a tensor."""
    tensors = {name[2:]: array.astype(dtype) for name, array in huginn_arrays().items() if name.startswith("w/")}
    tensors = {name: array for name, array in (tensors | (changes or {})).items() if array is not None}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(values))
    for name, content in tokenizer_files(SYMBOLS, max_positions=64).items():
        (path / name).write_bytes(content)
    return tensors
