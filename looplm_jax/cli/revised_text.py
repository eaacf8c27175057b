"""Terminal text that ends in a provisional token."""

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from looplm_jax.printing import visible


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
        shown = "".join(character if character.isprintable() else " " for character in visible(text, keep="\n\t"))
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
