"""Writes a model with norm placement `pre` as the Hugging Face folder of a Llama, which it is when applied once."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import looplm_jax
from looplm_jax.config import ModelConfig
from looplm_jax.convert._layout import TorchTensor, flat_arrays, torch_layout
from looplm_jax.convert._safetensors_io import write_weights
from looplm_jax.convert._tokenizer_files import tokenizer_files
from looplm_jax.files import staged_folder


def write_llama(checkpoint: Path, out: Path) -> None:
    """Writes the latest valid checkpoint in float32, without its gate, and its tokenizer as a tokenizer.json."""
    loaded = looplm_jax.load(checkpoint)
    config = loaded.recipe.model
    arrays = {path: jax.device_get(array) for path, array in flat_arrays(loaded.params).items()}

    def read(tensor: TorchTensor) -> np.ndarray:
        whole = arrays[tensor.path]
        return tensor.to_torch(whole if tensor.layer is None else whole[tensor.layer])

    tensors = [tensor for tensor in torch_layout(loaded.params) if tensor.path[0] != "gate"]
    with staged_folder(out) as folder:
        write_weights(folder, tensors, read, dtype="float32", max_bytes=2**30)
        (folder / "config.json").write_text(json.dumps(_llama_config(config), indent=2) + "\n")
        for name, content in tokenizer_files(loaded.need_tokenizer(), max_positions=config.max_positions).items():
            (folder / name).write_bytes(content)


def _llama_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the `config.json` of a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
    }
