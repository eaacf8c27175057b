"""Tables in Markdown."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with an empty line after it; columns whose first value is a number stand at the right."""
    numbers = [bool(rows) and isinstance(value, int | float) for value in (rows[0] if rows else head)]
    lines = [head, ["---:" if number else "---" for number in numbers], *rows]
    return "".join(f"| {' | '.join(_cell(value) for value in line)} |\n" for line in lines)


def shown(text: str, characters: int) -> str:
    """The text in one line, cut with an ellipsis where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|")
