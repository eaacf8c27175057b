"""Modulation of layers by time: how many of the loops of a call are done (LoopFormer, arXiv 2602.11451, section 3).

    c = phi(t) + psi(dt),  [g1, g2, s1, s2] = W silu(c) + b
    x = x + g1 attention((1 + s1) N(x)),  x = x + g2 mlp((1 + s2) N(x))

The times `t` and `dt` are fractions of a call, so a pass with fewer loops has larger steps. W and b start at zero, with
which each layer returns its input.
"""

from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from looplm_jax.models._parameters import parameter

_FEATURES = 256  # sines and cosines of a time

TIME_EMBEDDING = "time_embedding"  # the group of the parameters of phi and psi


@flax.struct.dataclass
class LoopTime:
    """The time of a loop, for all sequences or for each, as fractions of a call.

    Attributes:
      start: the sum of the steps of earlier loops, in [0, 1).
      step: the step of the loop. The steps of a call have a sum of 1.
    """

    start: Float[Array, "*B"]
    step: Float[Array, "*B"]

    @classmethod
    def even(cls, done: Int[ArrayLike, "*B"], loops: Int[ArrayLike, "*B"]) -> "LoopTime":
        """Returns the time of the loop after `done` others, in a call with `loops` loops of equal steps."""
        step = 1.0 / jnp.asarray(loops, jnp.float32)
        start = jnp.asarray(done, jnp.float32) * step
        return cls(start=start, step=jnp.broadcast_to(step, start.shape))

    @classmethod
    def of_steps(cls, done: Int[Array, "*B"], steps: Float[Array, "T"]) -> "LoopTime":
        """Returns the time of the loop after `done` others, in a call with these steps."""
        return cls(start=jnp.take(jnp.cumsum(steps) - steps, done), step=jnp.take(steps, done))


def time_features(times: Float[Array, "*B"]) -> Float[Array, "*B F"]:
    """Returns 128 cosines and then 128 sines of `t / 10000 ** (j / 128)`, in float32."""
    half = _FEATURES // 2
    rates = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = times[..., None] * rates.reshape(*[1] * times.ndim, -1)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """The map `silu(phi(t) + psi(dt))` of the time of a loop, in float32.

    Both phi and psi are two affine maps of features of a time, with SiLU between them.

    Attributes:
      width: the model width, D.
      initializer: the initializer of the matrices.
    """

    width: int
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, time: LoopTime) -> Float[Array, "b D"]:
        """Returns the embedding for each sequence, or one for all of them."""
        start, step = jnp.atleast_1d(time.start), jnp.atleast_1d(time.step)
        return nn.silu(self._embedded("start", start) + self._embedded("step", step))

    def _embedded(self, name: str, times: Float[Array, "b"]) -> Float[Array, "b D"]:
        hidden = _Affine(self.width, self.initializer, ("embed_in", "embed"), name=f"{name}_in")(time_features(times))
        return _Affine(self.width, self.initializer, ("embed_in", "embed"), name=f"{name}_out")(nn.silu(hidden))


class _Affine(nn.Module):
    """An affine map of vectors, whose matrix has a name of its own: it has no weight decay.

    Attributes:
      width: the number of outputs.
      initializer: the initializer of the matrix.
      axes: the logical names of the axes of the matrix.
    """

    width: int
    initializer: nn.initializers.Initializer
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: Float[Array, "b N"]) -> Float[Array, "b M"]:
        """Returns the outputs in the dtype of `x`."""
        matrix = parameter(self, "time_map", self.initializer, self.axes, (x.shape[-1], self.width))
        bias = parameter(self, "bias", nn.initializers.zeros, ("norm",), (self.width,))
        return x @ matrix.astype(x.dtype) + bias.astype(x.dtype)[None]


class LayerTime(NamedTuple):
    """The gates of the branches of a layer, and the scales of their inputs, without the 1 that is added to them.

    Layers that are not modulated have none.
    """

    attention_gate: Float[Array, "b 1 D"] | None = None
    mlp_gate: Float[Array, "b 1 D"] | None = None
    attention_scale: Float[Array, "b 1 D"] | None = None
    mlp_scale: Float[Array, "b 1 D"] | None = None


class Modulation(nn.Module):
    """The map from the embedding of the time to the gates and scales of one layer. It starts at zero."""

    @nn.compact
    def __call__(self, embedding: Float[Array, "b D"]) -> LayerTime:
        """Returns gates and scales in the dtype of the embedding."""
        width = 4 * embedding.shape[-1]
        out = _Affine(width, nn.initializers.zeros, ("embed", "norm"), name="layer")(embedding)
        return LayerTime(*jnp.split(out[:, None], 4, axis=-1))
