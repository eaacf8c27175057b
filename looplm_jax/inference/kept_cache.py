"""The prefix cache: a cache that outlives its request, with its tokens, so that the next request continues from it."""

import dataclasses

from jaxtyping import Array, Int

from looplm_jax.inference.kv_cache import Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """A prompt and the tokens that followed it.

    The prompt ran all loops, and saw earlier tokens through the planes that the cache keeps. The last token of an
    answer is in no cache: it is not part of this turn, but of the next prompt, if there is one.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    depths: tuple[int, ...]  # loops that each of `tokens` ran itself: the exit loop of the token after it

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KeptCache:
    """The cache row of a finished request, and the turns that it holds."""

    row: Cache = dataclasses.field(repr=False)
    turns: tuple[Turn, ...]

    def __len__(self) -> int:
        """Returns the number of tokens in the cache."""
        return sum(map(len, self.turns))

    @property
    def lengths(self) -> Int[Array, "1"]:
        """Returns the number of tokens in the row, as counted on the device."""
        return self.row.lengths

    @property
    def tokens(self) -> tuple[int, ...]:
        """Returns all tokens, in order."""
        return tuple(token for turn in self.turns for token in (*turn.prompt_ids, *turn.tokens))
