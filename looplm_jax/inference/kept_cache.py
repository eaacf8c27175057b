"""A cache that outlives its request, with what was read into it: the next request goes on from it."""

import dataclasses

from jaxtyping import Array, Int

from looplm_jax.inference.kv_cache import Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """A prompt, which ran all loops and read what was before it as the cache keeps that; and the tokens that followed.

    The last token of an answer is in no cache: it is not here, but in the next prompt, where there is one.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    depths: tuple[int, ...]  # loops that each of `tokens` ran itself: the exit loop of the token after it

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KeptCache:
    """The row of a request that is over, and the turns that it holds."""

    row: Cache = dataclasses.field(repr=False)
    turns: tuple[Turn, ...]

    def __len__(self) -> int:
        """Tokens in it."""
        return sum(map(len, self.turns))

    @property
    def lengths(self) -> Int[Array, "1"]:
        """Tokens in the row, as the device counts them."""
        return self.row.lengths

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of them, in order."""
        return tuple(token for turn in self.turns for token in (*turn.prompt_ids, *turn.tokens))
