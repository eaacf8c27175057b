"""A reference model from the specification: Python loops over loops and layers, and keys repeated for each group."""

import functools

import jax
import jax.numpy as jnp

from looplm_jax.config import (
    GatePlacement,
    Injection,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    Residual,
    StateNorm,
    TimeSignal,
)


def reference_forward(params, config: ModelConfig, loops, tokens, positions, segment_ids):
    """Returns hidden states [T, B, S, D] and gate logits [T, B, S]."""
    shared = config, positions, _mask(positions, segment_ids)
    embedded = config.embedding_scale * params["embedding"][tokens]
    if config.prelude_layers:
        embedded = _stack(params["prelude"], config.prelude_layers, embedded, *shared)

    h = embedded if config.injection is Injection.NONE else jnp.zeros_like(embedded)
    states, gates = [], []
    for loop in range(loops):
        x = _injected(params, h, embedded, config) + _signals(params, loop, positions, config)
        asking = h if config.injection is Injection.QUERY and loop > 0 else None
        gates.append(_gate(params, x, config))
        time = _time(params["time_embedding"], loop, loops) if config.time_signal is TimeSignal.MODULATION else None
        x = _stack(params["core"], config.num_layers, x, *shared, looped=True, asking=asking, time=time)
        seen = _norm(x, params["norm"], config)
        h = seen if config.state_norm is StateNorm.EVERY_LOOP else x
        if config.coda_layers:
            seen = _stack(params["coda"], config.coda_layers, seen, *shared)
            seen = _norm(seen, params["norm" if config.shared_readout_norm else "coda_norm"], config)
        states.append(seen)
        if config.gate is not GatePlacement.BEFORE:
            gates[-1] = _gate(params, seen, config)
    return jnp.stack(states), jnp.stack(gates)


def _gate(params, x, config):
    if config.gate is GatePlacement.NONE:
        return jnp.full(x.shape[:-1], -1e4)
    return x @ params["gate"]["kernel"] + params["gate"]["bias"][0]


def _injected(params, h, embedded, config):
    e = _norm(embedded, params["injection_norm"], config) if config.injection_norm else embedded
    match config.injection:
        case Injection.NONE:
            return h
        case Injection.ADD:
            return h + e
        case Injection.LINEAR:
            return jnp.concatenate([h, e], axis=-1) @ params["injection"]
        case Injection.DIAGONAL:
            a, b, matrix = (params["diagonal_injection"][name] for name in ("log_decay", "step_bias", "input_map"))
            step = jnp.log1p(jnp.exp(b))
            return jnp.exp(-step * jnp.exp(a))[None, None] * h + step[None, None] * (e @ matrix)
        case Injection.QUERY:
            return e


def _signals(params, loop, positions, config):
    signal = jnp.zeros((1, 1, config.width))
    if config.position_signal is PositionSignal.SINUSOID:
        signal = signal + _sinusoids(positions, config.width)
    if config.time_signal is TimeSignal.SINUSOID:
        signal = signal + _sinusoids(jnp.full((1, 1), loop), config.width)
    if config.time_signal is TimeSignal.LEARNED:
        signal = signal + config.width**0.5 * params["time_table"][loop][None, None]
    return signal


def _time(params, loop, loops):
    """Returns the embedding of a time, after its SiLU: the start of the loop and its length, as parts of the call."""

    def embedded(name, time):
        angles = time / 1e4 ** (jnp.arange(128) / 128)
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])
        x = jax.nn.silu(x @ params[f"{name}_in"]["time_map"] + params[f"{name}_in"]["bias"])
        return x @ params[f"{name}_out"]["time_map"] + params[f"{name}_out"]["bias"]

    return jax.nn.silu(embedded("start", loop / loops) + embedded("step", 1 / loops))


def _sinusoids(numbers, width):
    columns = []
    for j in range(width // 2):
        angle = (numbers + 1).astype(jnp.float32) / 1e4 ** (2 * j / width)
        columns += [jnp.sin(angle), jnp.cos(angle)]
    return jnp.stack(columns, axis=-1)


def _stack(params, length, h, config, positions, mask, looped=False, asking=None, time=None):
    for index in range(length):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        h = _layer(layer, h, h if asking is None else asking, config, positions, mask, looped, time)
    return h


@functools.partial(jax.jit, static_argnames=("config", "looped"))
def _layer(layer, h, asking, config, positions, mask, looped, time):
    before, after = _norms(config.norm_placement)
    skip, weight = _residual_weights(config) if looped else (1.0, 1.0)

    gates, scales = {}, {}
    if time is not None:
        affine = layer["modulation"]["layer"]
        parts = jnp.split(time @ affine["time_map"] + affine["bias"], 4)
        gates = {"attention_post_norm": parts[0][None, None], "mlp_post_norm": parts[1][None, None]}
        scales = {"attention_norm": parts[2][None, None], "mlp_norm": parts[3][None, None]}

    def norm(x, name):
        return (1 + scales.get(name, 0.0)) * (_norm(x, layer[name], config) if name in layer else x)

    assert ("attention_norm" in layer) == before
    assert ("attention_post_norm" in layer) == (after != "none")

    def total(h, branch, name):
        gate = gates.get(name, 1.0)
        if after == "branch":
            return skip * h + weight * gate * norm(branch, name)
        return norm(skip * h + weight * gate * branch, name)

    inputs = norm(asking, "attention_norm"), norm(h, "attention_norm")
    h = total(h, _attention(layer["attention"], *inputs, config, positions, mask), "attention_post_norm")
    x, mlp = norm(h, "mlp_norm"), layer["mlp"]
    branch = (jax.nn.silu(x @ mlp["gate"]["kernel"]) * (x @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    return total(h, branch, "mlp_post_norm")


def _norms(placement):
    """Returns whether a norm is before each branch, and what a norm after it applies to."""
    return {
        NormPlacement.SANDWICH: (True, "branch"),
        NormPlacement.PRE: (True, "none"),
        NormPlacement.POST: (False, "sum"),
        NormPlacement.OUTER: (True, "sum"),
    }[placement]


def _residual_weights(config):
    layers = config.loops * config.num_layers
    return {
        Residual.PLAIN: (1.0, 1.0),
        Residual.PER_LOOP: (1.0, 1 / (config.loops * config.num_layers**0.5)),
        Residual.DEEP_LOOP: ((2 * layers) ** 0.5, 1.0),
    }[config.residual]


def _norm(x, norm, config):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * norm["scale"][None, None]


def _attention(params, asking, x, config, positions, mask):
    sources = {"query": asking, "key": x, "value": x}
    query, key, value = (_projected(params[name], source) for name, source in sources.items())
    key, value = (jnp.repeat(part, config.num_heads // config.kv_heads, axis=1) for part in (key, value))
    query, key = (_rope(part, positions[:, None], config) for part in (query, key))
    scores = query @ jnp.swapaxes(key, 2, 3) * config.head_width**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhse,hed->bsd", weights @ value, params["out"]["kernel"])


def _projected(params, x):
    heads = jnp.einsum("bsd,dhe->bhse", x, params["kernel"])
    return heads + params["bias"][None, :, None] if "bias" in params else heads


def _rope(x, positions, config):
    """Computes `x cos + rotate_half(x) sin`, with the angles repeated, as in the PyTorch code."""
    if config.position_signal is not PositionSignal.ROTARY:
        return x
    half = config.head_width // 2
    inverse = config.rope_theta ** (-jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    angles = positions[..., None].astype(jnp.float32) * jnp.concatenate([inverse, inverse])[None, None, None]
    rotated = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * jnp.cos(angles) + rotated * jnp.sin(angles)


def _mask(positions, segment_ids):
    """A token attends to its own document up to itself; columns of the row, not positions, define the order."""
    place = jnp.arange(positions.shape[1])
    return (place[:, None] >= place[None, :])[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
