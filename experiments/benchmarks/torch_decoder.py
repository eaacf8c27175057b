"""Greedy decoding of the plain PyTorch twin with a preallocated cache, as a baseline for our decoder."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from experiments.benchmarks.torch_twin import Layer, TorchLoopLM, rotary_tables, rotate


class TorchDecoder:
    """Decodes with keys and values for each (loop, layer); every token runs through all loops."""

    def __init__(self, model: TorchLoopLM, *, batch: int, capacity: int, loops: int):
        config = model.config
        self._model, self._loops = model.eval(), loops
        shape = (loops, config.num_layers, batch, config.num_heads, capacity, config.head_width)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)
        self._cos, self._sin = rotary_tables(capacity, config)

    @torch.inference_mode()
    def fill(self, length: int) -> None:
        """Fills `length` positions with random keys and values, instead of running a prompt."""
        self._keys[..., :length, :].normal_()
        self._values[..., :length, :].normal_()

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: int) -> Tensor:
        """Returns the most probable next token of each sequence, `[B]`, after tokens `[B]` at `position`."""
        x = self._model.embedding(tokens[:, None])
        for loop in range(self._loops):
            for number, layer in enumerate(self._model.layers):
                x = self._layer(cast(Layer, layer), x, self._keys[loop, number], self._values[loop, number], position)
            x = self._model.norm(x)
        return self._model.head(x[:, -1]).argmax(-1)

    def _layer(self, layer: Layer, x: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """Applies one layer to one position, writing its keys and values to the cache."""
        normal, cos, sin = layer.norms[0](x), self._cos[position], self._sin[position]
        query, key, value = layer.project(normal)
        keys[:, :, position] = rotate(key, cos, sin)[:, :, 0]
        values[:, :, position] = value[:, :, 0]
        seen = slice(0, position + 1)
        mixed = functional.scaled_dot_product_attention(rotate(query, cos, sin), keys[:, :, seen], values[:, :, seen])
        return layer.finish(x, mixed)
