"""Rounds of drafts and their verification over a batch, until all of its rows have ended."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool

from looplm_jax.inference.speculation.begin import pad
from looplm_jax.inference.speculation.row import Row
from looplm_jax.inference.speculation.screening import Screen
from looplm_jax.inference.speculation.step import Draft, SpeculativeRows, Verified, draft, force, verify
from looplm_jax.models.looplm import LoopLM, Params


@dataclasses.dataclass(kw_only=True)
class Rounds:
    """A running batch: its rows on the host, and their state on the device."""

    model: LoopLM
    params: Params
    rows: Sequence[Row]
    state: SpeculativeRows
    draft_loops: int
    drafts: int
    screen: Screen | None
    usable: int  # ids below this may be inserted by a screen

    def run(self) -> None:
        """Drafts and verifies until every row has ended. Rows that have ended are idle in the meantime."""
        while not all(row.done for row in self.rows):
            drafted = self._draft()
            # The screen sees all rows before any of them is verified.
            forced = self._screen(drafted)
            self._verify(drafted, [row for row in self.rows if not row.done and not forced[row.index]])
            self._force(forced)

    def _draft(self) -> Draft:
        """Drafts tokens for all rows, and counts the passes of those that are not done."""
        for row in self.rows:
            row.passes += 0 if row.done else self.drafts * self.draft_loops
        self.state, drafted = draft(self.model, self.params, self.state, loops=self.draft_loops, drafts=self.drafts)
        return drafted

    def _screen(self, drafted: Draft) -> list[tuple[int, ...]]:
        """Returns, for each row, the tokens that the screen substitutes for its drafts, if any."""
        if self.screen is None:
            return [()] * len(self.rows)
        # The only transfer of drafts to the host; without a screen it is skipped.
        drafts = jax.device_get(drafted.tokens).tolist()
        return [() if row.done else row.screen(self.screen, drafts[row.index], self.usable) for row in self.rows]

    def _verify(self, drafted: Draft, rows: Sequence[Row]) -> None:
        """Verifies the drafts of some rows."""
        if not rows:
            return
        self.state, verified = verify(
            self.model, self.params, self.state, drafted, self._mask(rows), draft_loops=self.draft_loops
        )
        # One transfer per round.
        found = jax.device_get(verified)
        for row in rows:
            row.passes += self.state.cache.depth - self.draft_loops
            row.verify(_of(found, row))

    def _force(self, forced: Sequence[tuple[int, ...]]) -> None:
        """Appends the screen's tokens, in chunks of the size of a draft, so that one program serves all."""
        for start in range(0, max(len(tokens) for tokens in forced), self.drafts):
            part = pad([tokens[start : start + self.drafts] for tokens in forced], self.drafts)
            self.state, made = force(self.model, self.params, self.state, part.tokens, part.counts)

            found = jax.device_get(made)
            for row in self.rows:
                if part.counts[row.index]:
                    row.passes += self.state.cache.depth
                    row.extend(_of(found, row))

    def _mask(self, rows: Sequence[Row]) -> Bool[np.ndarray, "N"]:
        """Returns a mask of some rows."""
        mask = np.zeros(len(self.rows), bool)
        mask[[row.index for row in rows]] = True
        return mask


def _of(found: Verified, row: Row) -> Verified:
    """Returns the entry of one row."""
    return jax.tree.map(lambda x: x[row.index], found)
