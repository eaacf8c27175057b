"""A reference model from the specification: Python loops over loops and layers, and keys repeated for each group."""

import functools

import jax
import jax.numpy as jnp

from looplm_jax.config import Injection, ModelConfig, NormPlacement


def reference_forward(params, config: ModelConfig, loops, tokens, positions, segment_ids):
    """Returns hidden states [T, B, S, D] and gate logits [T, B, S]."""
    shared = config, positions, _mask(positions, segment_ids)
    embedded = params["embedding"][tokens]
    if config.prelude_layers:
        embedded = _stack(params["prelude"], config.prelude_layers, embedded, *shared)
    h = embedded if config.injection is Injection.NONE else jnp.zeros_like(embedded)
    states, gates = [], []
    for _ in range(loops):
        if config.injection is Injection.ADD:
            h = h + embedded
        if config.injection is Injection.LINEAR:
            h = jnp.concatenate([h, embedded], axis=-1) @ params["injection"]
        h = _norm(_stack(params["core"], config.num_layers, h, *shared), params["norm"], config)
        seen = h
        if config.coda_layers:
            seen = _stack(params["coda"], config.coda_layers, h, *shared)
            seen = _norm(seen, params["coda_norm"], config)
        states.append(seen)
        gates.append(seen @ params["gate"]["kernel"] + params["gate"]["bias"][0])
    return jnp.stack(states), jnp.stack(gates)


def _stack(params, length, h, config, positions, mask):
    for index in range(length):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        h = _layer(layer, h, config, positions, mask)
    return h


@functools.partial(jax.jit, static_argnames="config")
def _layer(layer, h, config, positions, mask):
    sandwich = config.norm_placement is NormPlacement.SANDWICH
    branch = _attention(layer["attention"], _norm(h, layer["attention_norm"], config), config, positions, mask)
    h = h + (_norm(branch, layer["attention_post_norm"], config) if sandwich else branch)
    x, mlp = _norm(h, layer["mlp_norm"], config), layer["mlp"]
    branch = (jax.nn.silu(x @ mlp["gate"]["kernel"]) * (x @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    return h + (_norm(branch, layer["mlp_post_norm"], config) if sandwich else branch)


def _norm(x, norm, config):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * norm["scale"][None, None]


def _attention(params, x, config, positions, mask):
    kernels = {name: params[name]["kernel"] for name in ("query", "key", "value")}
    query, key, value = (jnp.einsum("bsd,dhe->bhse", x, kernel) for kernel in kernels.values())
    key, value = (jnp.repeat(part, config.num_heads // config.kv_heads, axis=1) for part in (key, value))
    query, key = (_rope(part, positions[:, None], config) for part in (query, key))
    scores = query @ jnp.swapaxes(key, 2, 3) * config.head_width**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhse,hed->bsd", weights @ value, params["out"]["kernel"])


def _rope(x, positions, config):
    """Computes `x cos + rotate_half(x) sin`, with the angles repeated, as in the PyTorch code."""
    half = config.head_width // 2
    inverse = config.rope_theta ** (-jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    angles = positions[..., None].astype(jnp.float32) * jnp.concatenate([inverse, inverse])[None, None, None]
    rotated = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * jnp.cos(angles) + rotated * jnp.sin(angles)


def _mask(positions, segment_ids):
    """A token attends to its own document up to itself; columns of the row, not positions, define the order."""
    place = jnp.arange(positions.shape[1])
    return (place[:, None] >= place[None, :])[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
