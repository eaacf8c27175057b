"""Generated tokens of several requests as one batch of arrays, the input of a replay."""

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from looplm_jax.errors import UserError
from looplm_jax.inference._kv_cache import bucket
from looplm_jax.inference._requests import CachedTurn, Result

_NO_TURN = CachedTurn(prompt_ids=(), tokens=(), depths=())


@flax.struct.dataclass
class Turns:
    """H turns per row (see `CachedTurn`), oldest first, padded on the right.

    Rows with fewer turns start with empty turns. The contents of the padding have no effect.
    """

    prompts: Int[Array, "H B P"]
    prompt_lengths: Int[Array, "H B"]
    tokens: Int[Array, "H B N"]
    depths: Int[Array, "H B N"]
    lengths: Int[Array, "H B"]

    @classmethod
    def of(cls, histories: Sequence[Sequence[CachedTurn]], longest: int) -> "Turns":
        """Returns the turns of each row, padded to one of few sizes."""
        most = max(map(len, histories))
        # Empty turns first, so that the last turn of every row is its latest.
        turns = [[*[_NO_TURN] * (most - len(history)), *history] for history in histories]

        def stacked(pick: Callable[[CachedTurn], Sequence[int]]) -> tuple[Int[Array, "H B N"], Int[Array, "H B"]]:
            rows = [pick(own[number]) for number in range(most) for own in turns]
            padded = _padded(rows, 1, longest)
            return padded.reshape(most, len(turns), -1), _lengths(rows).reshape(most, len(turns))

        prompts, prompt_lengths = stacked(lambda turn: turn.prompt_ids)
        tokens, lengths = stacked(lambda turn: turn.tokens)
        depths, _ = stacked(lambda turn: turn.depths)
        return cls(prompts=prompts, prompt_lengths=prompt_lengths, tokens=tokens, depths=depths, lengths=lengths)

    @property
    def total(self) -> Int[Array, "B"]:
        """Returns the number of tokens in all turns of each row."""
        return jnp.sum(self.prompt_lengths + self.lengths, axis=0)


@flax.struct.dataclass
class Rollouts:
    """Prompts, the tokens that were generated after them, and the loop at which each of those was chosen.

    Rows are padded on the right. The contents of the padding have no effect, but its exit loops must be at least 1.
    """

    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, "B"]  # at least 1
    tokens: Int[Array, "B N"]
    exit_loops: Int[Array, "B N"]
    lengths: Int[Array, "B"]  # number of new tokens
    history: Turns | None = None  # the turns that the prompts continue
    room: int | None = flax.struct.field(pytree_node=False, default=None)  # tokens of the longest row, if less than all

    @classmethod
    def of(cls, results: Sequence[Result], *, loops: int, longest: int, tight: bool = False) -> "Rollouts":
        """Returns the tokens of results, and of the turns that these continued, padded to one of few sizes.

        Args:
          results: at least one.
          loops: the maximum number of loops per token in the engine that produced them.
          longest: the number of positions of the model.
          tight: whether to pad prompts and new tokens by at most an eighth, for training, where every position costs
            a forward and a backward pass. There are then more sizes, and programs: eight per power of two.

        Raises:
          UserError: there is no result, or a result has more loops than `loops`.
        """
        if not results:
            raise UserError("there is nothing to replay; give at least one result")
        _check_loops(results, loops)

        size = tight_bucket if tight else bucket
        prompts = [result.prompt_ids for result in results]
        tokens = [result.tokens for result in results]
        histories = [result.history for result in results]
        totals = [sum(map(len, own.history)) + len(own.prompt_ids) + len(own.tokens) for own in results]

        return cls(
            prompts=_padded(prompts, 0, longest, size),
            prompt_lengths=_lengths(prompts),
            tokens=_padded(tokens, 0, longest, size),
            exit_loops=_padded([result.exit_loops for result in results], 1, longest, size),
            lengths=_lengths(tokens),
            history=Turns.of(histories, longest) if any(histories) else None,
            room=size(max(totals), longest),
        )

    @property
    def mask(self) -> Bool[Array, "B N"]:
        """Returns a mask of the new tokens."""
        return jnp.arange(self.tokens.shape[1])[None] < self.lengths[:, None]

    @property
    def size(self) -> int:
        """Returns the number of positions that hold any complete row, S."""
        # Rows are padded in several places; without the padding, none is longer than `room`.
        together = self.prompts.shape[1] + self.tokens.shape[1]
        if self.history is not None:
            turns, _, of_prompt = self.history.prompts.shape
            together += turns * (of_prompt + self.history.tokens.shape[2])
        return together if self.room is None else min(self.room, together)

    @property
    def read_positions(self) -> Int[Array, "B N"]:
        """Returns the position whose state each new token was chosen from: that of the token before it."""
        before = self.prompt_lengths if self.history is None else self.prompt_lengths + self.history.total
        # Padding could point beyond the last position.
        return jnp.minimum(before[:, None] - 1 + jnp.arange(self.tokens.shape[1])[None], self.size - 1)

    def joined(self) -> Int[Array, "B S"]:
        """Returns, for each row, history, prompt and new tokens without padding between them."""
        return self._joined(lambda turns: (turns.prompts, turns.tokens))

    def depths(self, loops: int) -> Int[Array, "B S"]:
        """Returns the loops that each token of `joined` ran.

        A token of a prompt ran all loops, a new token those up to the exit loop of the next one.
        """
        return self._joined(lambda turns: (jnp.full_like(turns.prompts, loops), turns.depths))

    def _joined(self, values: Callable[[Turns], tuple[Array, Array]]) -> Int[Array, "B S"]:
        """Returns values of prompts and tokens in order, without the padding between them."""
        # The last turn is one like the others, so that all are joined in the same way.
        turns = [self._last_turn()] if self.history is None else [self.history, self._last_turn()]
        joined = jnp.concatenate([_in_order(*values(own)) for own in turns], axis=1)
        padding = jnp.concatenate([_in_order(*_padding(own)) for own in turns], axis=1)

        # A stable sort moves the padding to the end and keeps the order of everything else.
        order = jnp.argsort(padding, axis=1, stable=True)
        return jnp.take_along_axis(joined, order[:, : self.size], axis=1)

    def _last_turn(self) -> Turns:
        """Returns prompts and new tokens as a turn. The depth of the last token is unknown, and unused."""
        # A token runs until its successor exits, so depths are exit loops shifted by one.
        depths = jnp.roll(self.exit_loops, -1, axis=1)
        turn = Turns(self.prompts, self.prompt_lengths, self.tokens, depths, self.lengths)
        return jax.tree.map(lambda x: x[None], turn)


def _in_order(of_prompts: Shaped[Array, "H B P"], of_tokens: Shaped[Array, "H B N"]) -> Shaped[Array, "B H*(P+N)"]:
    """Returns the turns of each row one after another."""
    turns = jnp.concatenate([of_prompts, of_tokens], axis=2)
    # [H, B, P + N] -> [B, H * (P + N)]
    return jnp.swapaxes(turns, 0, 1).reshape(turns.shape[1], -1)


def _padding(turns: Turns) -> tuple[Bool[Array, "H B P"], Bool[Array, "H B N"]]:
    """Returns masks of the padding of prompts and tokens."""
    prompts = jnp.arange(turns.prompts.shape[2])[None, None] >= turns.prompt_lengths[..., None]
    return prompts, jnp.arange(turns.tokens.shape[2])[None, None] >= turns.lengths[..., None]


def _check_loops(results: Sequence[Result], loops: int) -> None:
    """Raises UserError if a token ran more loops than `loops`."""
    turns = [turn for result in results for turn in result.history]
    exits = [*(result.exit_loops for result in results), *(turn.depths for turn in turns)]
    most = max((max(own, default=1) for own in exits), default=1)
    if most > loops:
        raise UserError(f"a token was chosen at loop {most}, beyond loops={loops}; use the loops of its engine")


def tight_bucket(length: int, longest: int) -> int:
    """Returns the static size for `length` positions: at most an eighth more, and at most `longest`."""
    # Multiples of an eighth of the power of two below; lengths up to 16 are exact.
    step = 1 << max(0, length.bit_length() - 4)
    return min(-(-length // step) * step, longest)


def _padded(
    rows: Sequence[Sequence[int]], filler: int, longest: int, bucketed: Callable[[int, int], int] = bucket
) -> Int[Array, "B N"]:
    """Returns the rows as one array, padded to one of few sizes."""
    # At least one column, because an axis of length 0 has no position to gather from.
    size = bucketed(max(1, *map(len, rows)), longest)
    padded = np.full((len(rows), size), filler, np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return jnp.asarray(padded)


def _lengths(rows: Sequence[Sequence[int]]) -> Int[Array, "B"]:
    """Returns the length of each row."""
    return jnp.asarray(np.array([len(row) for row in rows], np.int32))
