"""Counters of an engine's work."""

import dataclasses


@dataclasses.dataclass
class EngineStats:
    """The work of an engine so far."""

    ticks: int = 0  # passes of the stack
    loops: int = 0  # loops of tokens in these passes, at most ticks times slots
    tokens: int = 0  # emitted new tokens
    prompt_tokens: int = 0
    seconds_a_tick: float = 0.0  # moving mean

    def timed(self, seconds: float) -> None:
        """Records the time of one tick."""
        self.seconds_a_tick = seconds if not self.seconds_a_tick else 0.9 * self.seconds_a_tick + 0.1 * seconds
