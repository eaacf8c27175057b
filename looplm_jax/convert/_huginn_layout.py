"""Maps each tensor of Huginn's PyTorch code to slices of our arrays.

Queries, keys and values are rows of one matrix, as are the two inputs of the feed-forward layer. Huginn rotates pairs
of neighboring entries of a head, and we rotate pairs of its halves, so the entries of queries and keys are reordered:
even ones first, then odd ones. Attention is the same in either order.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from looplm_jax.config import ModelConfig
from looplm_jax.convert._layout import Path, TorchTensor, check_tensor_names, refuse_wrappers
from looplm_jax.convert._placement import check_tied
from looplm_jax.convert._safetensors_io import WeightFolder
from looplm_jax.errors import UserError

EMBEDDING, HEAD, ROTARY_TABLE = "transformer.wte.weight", "lm_head.weight", "freqs_cis"
_STACKS = {"prelude": "prelude", "core": "core_block", "coda": "coda"}
_LAYER = re.compile(r"transformer\.(prelude|core_block|coda)\.(\d+)\.")
_NORMS = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuginnTensor(TorchTensor):
    """Some leading rows of a tensor of Huginn, which are one slice of one of our arrays.

    Attributes:
      rows: where the rows of the slice begin in the tensor.
      whole: the shape of the tensor.
      heads: whether entries of heads are reordered.
    """

    rows: int = 0
    whole: tuple[int, ...]
    heads: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the whole tensor."""
        return self.whole

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the slice of a whole tensor, in our layout."""
        if self.contracted:
            rows = tensor[self.rows : self.rows + math.prod(self.our_shape[self.contracted :])]
            ours = rows.T.reshape(self.our_shape)  # [out, in] -> [in, out] -> [in..., out...]
        elif self.heads:
            ours = tensor[self.rows].reshape(self.our_shape)  # biases, [H, Dh]
        else:
            return tensor
        return ours[..., _halves(self.our_shape[-1])] if self.heads else ours

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns our slice as rows of the tensor: the inverse of `to_ours`."""
        if self.heads:
            array = array[..., np.argsort(_halves(self.our_shape[-1]))]
        if self.contracted:
            return array.reshape(math.prod(self.our_shape[: self.contracted]), -1).T
        return array.reshape(1, 1, *self.our_shape) if self.heads else array


def _halves(width: int) -> np.ndarray:
    """Returns the even entries of a head, then the odd ones."""
    return np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])


def huginn_layout(config: ModelConfig) -> Iterator[HuginnTensor]:
    """Yields every slice of our arrays, with the tensor that holds it; slices of one tensor are adjacent."""
    width, table = config.width, (config.vocab_size, config.width)
    yield _tensor(EMBEDDING, ("embedding",), table, table)
    yield _tensor("transformer.adapter.weight", ("injection",), (2 * width, width), (width, 2 * width), contracted=1)

    layers = {"prelude": config.prelude_layers, "core": config.num_layers, "coda": config.coda_layers}
    for stack, length in layers.items():
        for layer in range(length):
            yield from _layer(config, stack, layer)
    yield _tensor("transformer.ln_f.weight", ("norm", "scale"), (width,), (width,))


def _layer(config: ModelConfig, stack: str, layer: int) -> Iterator[HuginnTensor]:
    """Yields the slices of one layer."""
    width, mlp, heads = config.width, config.mlp_width, (config.num_heads, config.head_width)
    prefix, ours = f"transformer.{_STACKS[stack]}.{layer}", (stack, "layers")
    inner = heads[0] * heads[1]

    for number, name in enumerate(("query", "key")):
        yield _tensor(
            f"{prefix}.attn.qk_bias",
            (*ours, "attention", name, "bias"),
            heads,
            (2, 1, *heads),
            layer=layer,
            rows=number,
            heads=True,
        )
    for number, name in enumerate(("query", "key", "value")):
        yield _tensor(
            f"{prefix}.attn.Wqkv.weight",
            (*ours, "attention", name, "kernel"),
            (width, *heads),
            (3 * inner, width),
            layer=layer,
            rows=number * inner,
            contracted=1,
            heads=name != "value",
        )
    out = (*ours, "attention", "out", "kernel")
    yield _tensor(f"{prefix}.attn.proj.weight", out, (*heads, width), (width, inner), layer=layer, contracted=2)

    for number, name in enumerate(("gate", "up")):
        yield _tensor(
            f"{prefix}.mlp.fc.weight",
            (*ours, "mlp", name, "kernel"),
            (width, mlp),
            (2 * mlp, width),
            layer=layer,
            rows=number * mlp,
            contracted=1,
        )
    down = (*ours, "mlp", "down", "kernel")
    yield _tensor(f"{prefix}.mlp.proj.weight", down, (mlp, width), (width, mlp), layer=layer, contracted=1)

    for number, name in enumerate(_NORMS, start=1):
        yield _tensor(f"{prefix}.norm_{number}.weight", (*ours, name, "scale"), (width,), (width,), layer=layer)


def _tensor(
    name: str,
    path: Path,
    our_shape: tuple[int, ...],
    whole: tuple[int, ...],
    *,
    layer: int | None = None,
    rows: int = 0,
    contracted: int = 0,
    heads: bool = False,
) -> HuginnTensor:
    return HuginnTensor(
        name=name,
        path=path,
        layer=layer,
        our_shape=our_shape,
        contracted=contracted,
        rows=rows,
        whole=whole,
        heads=heads,
    )


def by_tensor(layout: Iterator[HuginnTensor]) -> dict[str, list[HuginnTensor]]:
    """Returns the slices of each tensor, in the order of its rows."""
    return {name: list(slices) for name, slices in itertools.groupby(layout, key=lambda tensor: tensor.name)}


def match_huginn_tensors(weights: WeightFolder, config: ModelConfig) -> list[HuginnTensor]:
    """Returns the layout of the model if the files hold exactly its tensors, in their shapes.

    A table of rotary angles is not read, because it follows from the configuration; a head must equal the embedding.

    Raises:
      UserError: a tensor is missing, unexpected or misshapen; the message names it.
    """
    refuse_wrappers(weights.tensors, str(weights.path))
    _check_layers(weights, config)

    layout = list(huginn_layout(config))
    found = {name: stored.shape for name, stored in weights.tensors.items() if name != ROTARY_TABLE}
    has_head = found.pop(HEAD, None) is not None
    check_tensor_names(found, {tensor.name: tensor for tensor in layout}, str(weights.path))
    if has_head:
        check_tied(weights, HEAD, EMBEDDING, "tie_embeddings")
    return layout


def _check_layers(weights: WeightFolder, config: ModelConfig) -> None:
    """Refuses a config with other numbers of layers than the files, before a layout of its size is created."""
    found = {match.groups() for name in weights.tensors if (match := _LAYER.match(name))}
    numbers = {"prelude": config.prelude_layers, "core_block": config.num_layers, "coda": config.coda_layers}
    for stack, number in numbers.items():
        held = sum(name == stack for name, _ in found)
        if held != number:
            raise UserError(f"{weights.path}: config.json asks for {number} layers of {stack}, the files hold {held}")


# Derived tensors


def rotary_table(config: ModelConfig) -> Float[np.ndarray, "1 S 1 half 2"]:
    """Returns the buffer of cosines and sines that Huginn's code saves with its weights, in float32."""
    exponents = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
    rates = (1 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    angles = np.outer(np.arange(config.max_positions, dtype=np.float32), rates).astype(np.float32)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None, :, None]


def rotary_tensor(config: ModelConfig) -> HuginnTensor:
    """Returns the place of `rotary_table` in a folder. It is none of our arrays."""
    shape = (1, config.max_positions, 1, config.head_width // 2, 2)
    return _tensor(ROTARY_TABLE, (), shape, shape)
