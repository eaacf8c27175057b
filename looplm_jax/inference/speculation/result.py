"""What comes of a prompt that was continued by speculation."""

import dataclasses

from looplm_jax.inference.sampling import Sampling
from looplm_jax.inference.stopping import Finish


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeResult:
    """The new tokens of a prompt; a stop token is the last one. `finish` is STOP where a screen ended it, too: see
    `screened`.

    Log-probabilities are those of loop T at temperature 1 by the raw logits, nats.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str  # without a stop string and what follows; empty without a tokenizer
    finish: Finish
    screened: bool = False  # whether a screen ended it
    error: str = ""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)  # of the row
    loops: int  # T
    drafted: int  # drafts that were verified; those beyond the last token that was asked for are left out
    accepted: int  # drafts among the tokens
    passes: int  # of the stack, one after another, each over one token of this row or over several at once

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that became tokens; 0 where there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def loops_per_token(self) -> float:
        """Passes of the stack a token: what decoding waits for. T without speculation; 0 where there is no token."""
        return self.passes / len(self.tokens) if self.tokens else 0.0
