"""Views of a generation in progress: colored by loops, plain, or as JSON.

On a terminal, control characters in the text are shown as escapes; a file or a pipe gets the text unchanged.
"""

import sys
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from looplm_jax import json_io
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.inference import Finish, NewToken, Result
from looplm_jax.terminal import with_escapes

# From few loops to many; legible on dark and light terminals.
_PALETTE = ("#3f8fd2", "#20a4b5", "#2f9e6e", "#7a9a2e", "#c48a16", "#d2691e", "#d1495b", "#b04bc0")

_ENDS = {
    Finish.STOP: "the text ended",
    Finish.LENGTH: "length reached",
    Finish.CANCELLED: "interrupted",
    Finish.FAILED: "failed",
}


# The interface, and the clock


@runtime_checkable
class View(Protocol):
    """Shows the tokens of one answer."""

    def show(self, new: NewToken) -> None:
        """Shows one more token."""

    def propose(self, token: int) -> None:
        """Shows a provisional next token."""

    def finish(self, result: Result, rate: float | None) -> None:
        """Ends the answer, generated at `rate` tokens per second."""


class Stopwatch:
    """Measures tokens per second from the second token on, because the first two wait for the compiler."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def tick(self, new: NewToken) -> None:
        """Records the arrival of a token."""
        del new
        self._times.append(time.perf_counter())

    @property
    def rate(self) -> float | None:
        """Returns tokens per second, or None for fewer than three tokens."""
        if len(self._times) < 3:
            return None
        # Intervals from the second token on.
        return (len(self._times) - 2) / (self._times[-1] - self._times[1])


# The three views


class ColorView:
    """Shows a header, then the new text with each token in the color of its loops."""

    def __init__(self, console: Console, tokenizer: Tokenizer, *, max_loops: int, header: Text | None = None):
        self._console, self._tokenizer, self._max_loops = console, tokenizer, max_loops
        self._header = header
        self._text = RevisedText(console)
        self._shown = 0

    def show(self, new: NewToken) -> None:
        """Prints the text that became final with the token."""
        self._begin()
        self._text.write(Text(with_escapes(new.text), style=loop_color(new.exit_loop, self._max_loops)))
        self._shown += len(new.text)

    def propose(self, token: int) -> None:
        """Prints the token dimly until other output replaces it."""
        self._text.propose(self._tokenizer.piece(token))

    def finish(self, result: Result, rate: float | None) -> None:
        """Prints the remaining text and the summary."""
        self._begin()
        self._text.write(Text(with_escapes(result.text[self._shown :]), style="dim"))
        self._console.print()
        # The rate is missing for very short texts.
        self._console.print(summary(result, rate), style="dim")

    def _begin(self) -> None:
        """Prints the header once, before the first text."""
        if self._header is not None:
            self._text.write(self._header)
            self._header = None


class RevisedText:
    """Prints text. A proposed piece is dim, and is replaced by the next output."""

    def __init__(self, console: Console):
        self._console = console
        self._line = ""  # the text on the current line, to know where the line ends
        self._proposed = 0  # width of the proposed piece in cells

    def write(self, text: Text) -> None:
        """Prints final text."""
        self._erase()
        self._print(text)
        self._line = f"{self._line}{text.plain}".rpartition("\n")[2]

    def propose(self, text: str) -> None:
        """Prints a provisional piece, unless it would reach the end of the line, where backspace cannot return."""
        self._erase()
        # A line break or tab could not be taken back.
        shown = "".join(character if character.isprintable() else " " for character in with_escapes(text, keep="\n\t"))
        # Wide characters take two cells.
        width = cell_len(shown)
        if cell_len(self._line.expandtabs()) % self._console.width + width < self._console.width:
            self._print(Text(shown, style="dim"))
            self._proposed = width

    def _erase(self) -> None:
        """Overwrites the provisional piece with spaces."""
        # Back, over with spaces, and back again.
        back = "\b" * self._proposed
        self._console.file.write(f"{back}{' ' * self._proposed}{back}")
        self._proposed = 0

    def _print(self, text: Text) -> None:
        """Prints without a line break."""
        self._console.print(text, end="", soft_wrap=True)


class PlainView:
    """Shows the new text, then a line with the loops of every token."""

    def __init__(self, header: str = ""):
        self._header = header
        self._shown = 0
        # Escape sequences could change the state of a terminal; a file gets the exact text.
        self._as_shown: Callable[[str], str] = with_escapes if sys.stdout.isatty() else str

    def show(self, new: NewToken) -> None:
        """Prints the text that became final with the token."""
        self._begin()
        print(self._as_shown(new.text), end="", flush=True)
        self._shown += len(new.text)

    def propose(self, token: int) -> None:
        """Does nothing: this view cannot erase what it printed."""

    def finish(self, result: Result, rate: float | None) -> None:
        """Prints the remaining text, the loops and the summary."""
        self._begin()
        print(self._as_shown(result.text[self._shown :]))

        # Numbers of one digit need no separator.
        separator = "" if max(result.exit_loops, default=0) < 10 else " "
        print(f"loops per token: {separator.join(map(str, result.exit_loops))}")
        print(summary(result, rate))

    def _begin(self) -> None:
        """Prints the header once, before the first text."""
        print(self._as_shown(self._header), end="")
        self._header = ""


class JsonView:
    """Prints one JSON object at the end."""

    def __init__(self, tokenizer: Tokenizer, prompt: str):
        self._tokenizer, self._prompt = tokenizer, prompt
        self._previews: list[list[str]] = []

    def show(self, new: NewToken) -> None:
        """Records the predictions for the token at each of its loops."""
        self._previews.append([self._tokenizer.piece(token) for token in new.previews])

    def propose(self, token: int) -> None:
        """Does nothing: the token includes its previews."""

    def finish(self, result: Result, rate: float | None) -> None:
        """Prints the object."""
        values = {
            "prompt": self._prompt,
            "index": result.sampling.index,
            "sample": result.sampling.sample,
            "text": result.text,
            "tokens": result.tokens,
            "pieces": [self._tokenizer.piece(token) for token in result.tokens],
            "exit_loops": result.exit_loops,
            "log_probs": result.log_probs,
            "prompt_tokens": len(result.prompt_ids),
            "finished": result.finish.value,
            "mean_loops": result.mean_loops,
            "tokens_per_second": rate,
        }

        # Only requests with --revise have previews.
        if any(self._previews):
            values["previews"] = self._previews
        print(json_io.dumps(values))


# Text of the views


def header(prompt: str, max_loops: int) -> Text:
    """Returns the legend, and the prompt that the text continues."""
    return Text.assemble(legend(max_loops), "\n", (with_escapes(prompt), "dim"))


def legend(max_loops: int) -> Text:
    """Returns each number of loops in its color."""
    numbers = [(f" {loops}", loop_color(loops, max_loops)) for loops in range(1, max_loops + 1)]
    return Text.assemble("loops:", *numbers)


def loop_color(loops: int, max_loops: int) -> str:
    """Returns a color of the palette, which spans 1..`max_loops`."""
    # With few loops the colors are far apart, with many they are shared.
    place = (loops - 1) / max(1, max_loops - 1)
    return _PALETTE[round(place * (len(_PALETTE) - 1))]


def summary(result: Result, rate: float | None) -> str:
    """Returns one line: the number of tokens, their cost, and why the text ended."""
    end = _ENDS[result.finish]
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    return f"{len(result.tokens)} tokens, {result.mean_loops:.2f} loops per token on average{speed}; {end}"
