"""The result of continuing a prompt by speculation."""

import dataclasses

from looplm_jax.inference.sampling import Sampling
from looplm_jax.inference.stopping import Finish


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeResult:
    """The new tokens of a prompt; a stop token is included as the last one.

    `finish` is also STOP if a screen ended the row; see `screened`. Log-probabilities are those of loop T at
    temperature 1, from the raw logits, in nats.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str  # without the stop string and what follows it; empty without a tokenizer
    finish: Finish
    screened: bool = False  # whether a screen ended the row
    error: str = ""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)  # the settings of the row
    loops: int  # T
    drafted: int  # verified drafts, not counting those beyond the last requested token
    accepted: int  # drafts that became tokens
    passes: int  # sequential passes of the stack, each over one or several tokens of this row

    @property
    def acceptance_rate(self) -> float:
        """Returns the fraction of drafts that became tokens; 0 if there were no drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def loops_per_token(self) -> float:
        """Returns sequential passes of the stack per token: T without speculation; 0 if there is no token."""
        return self.passes / len(self.tokens) if self.tokens else 0.0
