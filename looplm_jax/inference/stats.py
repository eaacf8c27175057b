"""Counts of what an engine has done."""

import dataclasses


@dataclasses.dataclass
class EngineStats:
    """What was done so far."""

    ticks: int = 0  # passes of the stack
    loops: int = 0  # loops of tokens in them: ticks times slots at best
    tokens: int = 0  # new tokens given out
    prompt_tokens: int = 0
    seconds_a_tick: float = 0.0  # moving mean

    def timed(self, seconds: float) -> None:
        """One more tick's time."""
        self.seconds_a_tick = seconds if not self.seconds_a_tick else 0.9 * self.seconds_a_tick + 0.1 * seconds
