"""Text on a terminal that ends in a token which may still change."""

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from looplm_jax.printing import visible


class RevisedText:
    """Prints pieces one behind the other. A proposed piece is dim, and makes way for the next thing that is printed."""

    def __init__(self, console: Console):
        self._console = console
        self._line = ""  # what stands on the line so far, to know where it ends
        self._proposed = 0  # cells

    def write(self, text: Text) -> None:
        """Print for good."""
        self._erase()
        self._print(text)
        self._line = f"{self._line}{text.plain}".rpartition("\n")[2]

    def propose(self, text: str) -> None:
        """Print for now; not where it would reach the end of the line, from which no terminal goes back."""
        self._erase()
        shown = "".join(character if character.isprintable() else " " for character in visible(text, keep="\n\t"))
        width = cell_len(shown)
        if cell_len(self._line.expandtabs()) % self._console.width + width < self._console.width:
            self._print(Text(shown, style="dim"))
            self._proposed = width

    def _erase(self) -> None:
        back = "\b" * self._proposed
        self._console.file.write(f"{back}{' ' * self._proposed}{back}")
        self._proposed = 0

    def _print(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)
