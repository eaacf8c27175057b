"""Models of the dense-start experiment: a dense model as a Llama folder, and a sandwich whose norms match it.

The second norm of a sandwich scales the output of a branch, token by token, to the root mean square of the norm's
weights. With `with_second_norms` those weights are the mean of the branch outputs' root mean squares in the dense
model, measured on one batch.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import looplm_jax
from looplm_jax.checkpoints._raw import read_raw, write_raw
from looplm_jax.config import ModelConfig, Recipe
from looplm_jax.convert._layout import TorchTensor, flat_arrays, torch_layout
from looplm_jax.convert._safetensors_io import write_weights
from looplm_jax.convert._tokenizer_files import tokenizer_files
from looplm_jax.data import train_batches
from looplm_jax.files import staged_folder
from looplm_jax.models import Params
from looplm_jax.models._blocks import Attention, Context, RMSNorm, SwiGLU, make_context

# The dense model as a Llama


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


# Second norms that match the dense model


_SECOND_NORMS = {
    "attention": "params.core.layers.attention_post_norm.scale",
    "mlp": "params.core.layers.mlp_post_norm.scale",
}


def with_second_norms(checkpoint: Path, out: Path, scales: dict[str, Float[Array, "L"]]) -> None:
    """Copies a sandwich checkpoint, with these weights in the norms after its branches, one value per layer."""
    whole = read_raw(checkpoint)
    arrays = dict(whole.arrays)
    for branch, name in _SECOND_NORMS.items():
        # [L] -> [L, D]: one value for all weights of a norm.
        arrays[name] = jnp.broadcast_to(scales[branch][:, None], arrays[name].shape).astype(arrays[name].dtype)
    with staged_folder(out) as folder:
        write_raw(folder, dataclasses.replace(whole, arrays=arrays))


def matched_scales(checkpoint: Path, recipe: Recipe) -> dict[str, Float[Array, "L"]]:
    """Returns, per branch and layer, the root mean square of its output, averaged over one training batch's tokens."""
    loaded, stage = looplm_jax.load(checkpoint), recipe.stages[0]
    batches = train_batches(
        recipe.data,
        loaded.need_tokenizer(),
        batch_size=16,
        sequence_length=stage.sequence_length,
        seed=recipe.data.seed,
    )

    batch = next(batches)
    # Stops the threads that read ahead.
    batches.close()

    context = make_context(loaded.recipe.model, jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids))
    return branch_sizes(loaded.params, loaded.recipe.model, jnp.asarray(batch.tokens), context)


def branch_sizes(
    params: Params, config: ModelConfig, tokens: Int[Array, "B S"], context: Context
) -> dict[str, Float[Array, "L"]]:
    """Returns the mean root mean square of each branch's output per layer, in one pass without second norms."""
    norm, attention, mlp = RMSNorm(config.norm_eps), Attention(config), SwiGLU(config)

    def layer(x: Array, weights: Params) -> tuple[Array, dict[str, Array]]:
        normal = norm.apply({"params": weights["attention_norm"]}, x)
        mixed, _ = attention.apply({"params": weights["attention"]}, normal, context)
        x = x + mixed

        normal = norm.apply({"params": weights["mlp_norm"]}, x)
        added = cast(Array, mlp.apply({"params": weights["mlp"]}, normal))

        return x + added, {"attention": _size(mixed), "mlp": _size(added)}

    return jax.lax.scan(layer, params["embedding"][tokens], params["core"]["layers"])[1]


def _size(x: Float[Array, "B S D"]) -> Float[Array, ""]:
    """Returns the mean over tokens of the root mean square over the width."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1)).mean()
