"""A data-dependent start of a sandwich from a dense model: each branch adds as much as it does in that model.

The second norm gives what a branch adds the root mean square of its weights, token by token. Here those weights are
the mean of what the branch adds in the dense model, measured on a batch.
"""

import dataclasses
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import looplm_jax
from looplm_jax.checkpoints.whole import read_whole, write_whole
from looplm_jax.config import ModelConfig, Recipe
from looplm_jax.convert.output_folder import fresh_folder
from looplm_jax.data import train_batches
from looplm_jax.models.blocks import Attention, Context, RMSNorm, SwiGLU, make_context
from looplm_jax.models.looplm import Params

_SECOND_NORMS = {
    "attention": "params.core.layers.attention_post_norm.scale",
    "mlp": "params.core.layers.mlp_post_norm.scale",
}


def with_second_norms(checkpoint: Path, out: Path, scales: dict[str, Float[Array, "L"]]) -> None:
    """A copy of the checkpoint of a sandwich with these weights in the norms after its branches, one for each layer."""
    whole = read_whole(checkpoint)
    arrays = dict(whole.arrays)
    for branch, name in _SECOND_NORMS.items():
        arrays[name] = jnp.broadcast_to(scales[branch][:, None], arrays[name].shape).astype(arrays[name].dtype)
    with fresh_folder(out) as folder:
        write_whole(folder, dataclasses.replace(whole, arrays=arrays))


def matched_scales(checkpoint: Path, recipe: Recipe) -> dict[str, Float[Array, "L"]]:
    """Of each branch of each layer, the mean over the tokens of one training batch of its root mean square."""
    loaded, stage = looplm_jax.load(checkpoint), recipe.stages[0]
    batches = train_batches(
        recipe.data,
        loaded.need_tokenizer(),
        batch_size=16,
        sequence_length=stage.sequence_length,
        seed=recipe.data.seed,
    )
    batch = next(batches)
    batches.close()
    context = make_context(loaded.recipe.model, jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids))
    return branch_sizes(loaded.params, loaded.recipe.model, jnp.asarray(batch.tokens), context)


def branch_sizes(
    params: Params, config: ModelConfig, tokens: Int[Array, "B S"], context: Context
) -> dict[str, Float[Array, "L"]]:
    """Mean root mean square of what each branch of each layer adds in one pass through a stack without second norms."""
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
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1)).mean()
