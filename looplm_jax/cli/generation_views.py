"""Ways to show a generation while it is made: coloured by loops, plain, or as JSON."""

import json
import time
from typing import Protocol

from rich.console import Console
from rich.text import Text

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.inference import Finish, NewToken, Result
from looplm_jax.inference.text_stream import TextStream

# From few loops to many; legible on dark and on light terminals.
_PALETTE = ("#3f8fd2", "#20a4b5", "#2f9e6e", "#7a9a2e", "#c48a16", "#d2691e", "#d1495b", "#b04bc0")


class View(Protocol):
    """Where tokens are shown."""

    def show(self, new: NewToken) -> None:
        """One more token."""

    def finish(self, result: Result) -> None:
        """All of them are there."""


class Stopwatch:
    """Tokens a second, counted from the second token on: the first two wait for the compiler."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def tick(self) -> None:
        """A token has come."""
        self._times.append(time.perf_counter())

    @property
    def started(self) -> bool:
        """Whether a token has come."""
        return bool(self._times)

    @property
    def rate(self) -> float | None:
        """Tokens a second, or None for fewer than three."""
        if len(self._times) < 3:
            return None
        return (len(self._times) - 2) / (self._times[-1] - self._times[1])


class ColourView:
    """A legend, the prompt dimmed, then the new text, each token in the colour of its loops."""

    def __init__(self, console: Console, stream: TextStream, prompt: str, *, max_loops: int):
        self._console, self._stream, self._prompt = console, stream, prompt
        self._max_loops = max_loops
        self._stopwatch = Stopwatch()

    def show(self, new: NewToken) -> None:
        """Print what the token adds, and before the first one the legend and the prompt."""
        if not self._stopwatch.started:
            self._console.print(legend(self._max_loops))
            self._write(self._prompt, "dim")
        self._stopwatch.tick()
        self._write(self._stream.push(new.token), loop_colour(new.exit_loop, self._max_loops))

    def finish(self, result: Result) -> None:
        """Print the summary."""
        self._write(self._stream.close(), "dim")
        self._console.print()
        self._console.print(summary(result, self._stopwatch.rate))

    def _write(self, text: str, style: str) -> None:
        self._console.print(Text(text, style=style), end="", soft_wrap=True)


class PlainView:
    """The new text, then a line with the loops of every token."""

    def __init__(self, stream: TextStream):
        self._stream, self._stopwatch = stream, Stopwatch()

    def show(self, new: NewToken) -> None:
        """Print what the token adds."""
        self._stopwatch.tick()
        print(self._stream.push(new.token), end="", flush=True)

    def finish(self, result: Result) -> None:
        """Print loops and summary."""
        print(self._stream.close())
        separator = "" if max(result.exit_loops) < 10 else " "
        print(f"loops per token: {separator.join(map(str, result.exit_loops))}")
        print(summary(result, self._stopwatch.rate))


class JsonView:
    """Nothing until the end, then one object."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._stopwatch = tokenizer, Stopwatch()

    def show(self, new: NewToken) -> None:
        """Wait."""
        del new
        self._stopwatch.tick()

    def finish(self, result: Result) -> None:
        """Print it."""
        values = {
            "text": self._tokenizer.decode(result.tokens),
            "tokens": result.tokens,
            "pieces": [self._tokenizer.piece(token) for token in result.tokens],
            "exit_loops": result.exit_loops,
            "log_probs": result.log_probs,
            "prompt_tokens": len(result.prompt_ids),
            "finished": result.finish.value,
            "mean_loops": result.mean_loops,
            "tokens_per_second": self._stopwatch.rate,
        }
        print(json.dumps(values))


def legend(max_loops: int) -> Text:
    """Each number of loops in its colour."""
    numbers = [(f" {loops}", loop_colour(loops, max_loops)) for loops in range(1, max_loops + 1)]
    return Text.assemble("loops:", *numbers)


def loop_colour(loops: int, max_loops: int) -> str:
    """A colour of the palette, spread over 1..`max_loops`."""
    place = (loops - 1) / max(1, max_loops - 1)
    return _PALETTE[round(place * (len(_PALETTE) - 1))]


def summary(result: Result, rate: float | None) -> str:
    """One line: how many tokens, at what cost, and why they end."""
    end = "the text ended" if result.finish is Finish.STOP else "length reached"
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    return f"{len(result.tokens)} tokens, {result.mean_loops:.2f} loops per token on average{speed}; {end}"
