"""Tiny Ouro models as Hugging Face folders, with the names and shapes of the specification."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from looplm_jax.config import ModelConfig
from looplm_jax.convert._ouro_config import to_ouro_config

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MULTI_HEAD = ModelConfig(vocab_size=272, width=32, mlp_width=48, num_layers=2, num_heads=4, max_positions=128)
GROUPED = ModelConfig(
    vocab_size=272, width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=128
)
TIED = ModelConfig(vocab_size=272, width=32, mlp_width=48, num_layers=2, num_heads=4, max_positions=128, tied_head=True)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor of the PyTorch model."""
    width, mlp, vocab = config.width, config.mlp_width, config.vocab_size
    heads, kv_heads = config.num_heads * config.head_width, config.kv_heads * config.head_width
    layer = {
        "self_attn.q_proj": (heads, width),
        "self_attn.k_proj": (kv_heads, width),
        "self_attn.v_proj": (kv_heads, width),
        "self_attn.o_proj": (width, heads),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "input_layernorm": (width,),
        "input_layernorm_2": (width,),
        "post_attention_layernorm": (width,),
        "post_attention_layernorm_2": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {
        "model.norm.weight": (width,),
        "model.early_exit_gate.weight": (1, width),
        "model.early_exit_gate.bias": (1,),
    }
    return shapes if config.tied_head else shapes | {"lm_head.weight": (vocab, width)}


def make_tensors(config: ModelConfig, dtype=jnp.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a random array for every tensor."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in tensor_shapes(config).items()}


def config_json(config: ModelConfig, dtype=jnp.float32) -> dict:
    """Returns config.json with the published fields."""
    return {**to_ouro_config(config, dtype=str(jnp.dtype(dtype))), "bos_token_id": 0, "eos_token_id": 0}


def tokenizer_json(vocab_size: int) -> bytes:
    """Returns a byte-level BPE like Ouro's: three special tokens, 256 bytes, and merges of two letters."""
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    letters += [chr(0x100 + code) for code in range(256 - len(letters))]  # the bytes that have no letter
    pairs = [(a, b) for a in "etaoinshrdlu" for b in "etaoinshrdlu"]
    merges = pairs[: vocab_size - len(SPECIAL_TOKENS) - len(letters)]
    pieces = [*SPECIAL_TOKENS, *letters, *(a + b for a, b in merges)]
    assert len(pieces) == vocab_size
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name, **plain} for index, name in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }
    return json.dumps(content).encode()


def write_weights(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Writes one file, or several with an index."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    weight_map = {tensor: names[index % shards] for index, tensor in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file, metadata)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_hf_folder(
    folder: Path,
    config: ModelConfig = MULTI_HEAD,
    *,
    dtype=jnp.float32,
    shards: int = 1,
    tensors: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a complete model and returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = make_tensors(config, dtype) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config_json(config, dtype)))
    (folder / "tokenizer.json").write_bytes(tokenizer_json(config.vocab_size))
    write_weights(folder, tensors, shards)
    return tensors
