"""Tables in Markdown."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table, followed by an empty line. Columns whose first value is a number are right-aligned."""
    numbers = [bool(rows) and isinstance(value, int | float) for value in (rows[0] if rows else head)]
    lines = [head, ["---:" if number else "---" for number in numbers], *rows]
    return "".join(f"| {' | '.join(_cell(value) for value in line)} |\n" for line in lines)


def shown(text: str, characters: int) -> str:
    """Returns the text on one line, shortened with an ellipsis if it is longer than `characters`."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def _cell(value: object) -> str:
    """Returns a value as the content of a table cell."""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|")
