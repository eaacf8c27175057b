"""Generated tokens of several requests as one batch of arrays: what a replay needs of them."""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from looplm_jax.errors import UserError
from looplm_jax.inference.kv_cache import bucket
from looplm_jax.inference.requests import Result


@flax.struct.dataclass
class Rollouts:
    """Prompts, the tokens that were generated after them, and the loop that each of those was chosen at.

    Rows are padded on the right; what stands in the padding has no influence, but exit loops there must be at least 1.
    """

    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, "B"]  # at least 1
    tokens: Int[Array, "B N"]
    exit_loops: Int[Array, "B N"]
    lengths: Int[Array, "B"]  # new tokens

    @classmethod
    def of(cls, results: Sequence[Result], *, loops: int, longest: int) -> "Rollouts":
        """The tokens of results, padded to sizes of which there are few.

        Args:
          results: at least one; none of them goes on from a kept cache, whose tokens a result does not have.
          loops: the most loops of a token in the engine that they come from.
          longest: positions of the model.

        Raises:
          UserError: no result, or one with more loops than `loops`.
        """
        if not results:
            raise UserError("there is nothing to replay; give at least one result")
        most = max((loop for result in results for loop in result.exit_loops), default=1)
        if most > loops:
            raise UserError(f"a token was chosen at loop {most}, beyond loops={loops}; use the loops of its engine")
        prompts = [result.prompt_ids for result in results]
        tokens = [result.tokens for result in results]
        return cls(
            prompts=_padded(prompts, 0, longest),
            prompt_lengths=_lengths(prompts),
            tokens=_padded(tokens, 0, longest),
            exit_loops=_padded([result.exit_loops for result in results], 1, longest),
            lengths=_lengths(tokens),
        )

    @property
    def mask(self) -> Bool[Array, "B N"]:
        """Where there is a new token."""
        return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]

    @property
    def read_positions(self) -> Int[Array, "B N"]:
        """The position whose state each new token was chosen from: that of the token before it."""
        return self.prompt_lengths[:, None] - 1 + jnp.arange(self.tokens.shape[1])

    def joined(self) -> Int[Array, "B S"]:
        """Each prompt with its new tokens behind it, for S = P + N."""
        number = self._number()
        prompts = jnp.pad(self.prompts, ((0, 0), (0, self.tokens.shape[1])))
        return jnp.where(number < 0, prompts, self._new(self.tokens, number))

    def depths(self, loops: int) -> Int[Array, "B S"]:
        """The loops that each token of `joined` ran itself: a prompt all of them, a new token until the next left."""
        number = self._number()
        return jnp.where(number < 0, jnp.int32(loops), self._new(self.exit_loops, number + 1))

    def _number(self) -> Int[Array, "B S"]:
        """Which new token stands at each position; negative in the prompt."""
        return jnp.arange(self.prompts.shape[1] + self.tokens.shape[1]) - self.prompt_lengths[:, None]

    def _new(self, values: Int[Array, "B N"], number: Int[Array, "B S"]) -> Int[Array, "B S"]:
        return jnp.take_along_axis(values, jnp.clip(number, 0, values.shape[1] - 1), axis=1)


def _padded(rows: Sequence[Sequence[int]], filler: int, longest: int) -> Int[Array, "B N"]:
    size = bucket(max(1, *map(len, rows)), longest)
    padded = np.full((len(rows), size), filler, np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return jnp.asarray(padded)


def _lengths(rows: Sequence[Sequence[int]]) -> Int[Array, "B"]:
    return jnp.asarray(np.array([len(row) for row in rows], np.int32))
