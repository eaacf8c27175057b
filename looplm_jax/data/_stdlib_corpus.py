"""A real corpus that needs no download: the source code of Python's standard library, docstrings included."""

import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Third-party packages, tests and test data, which are not useful training text.
_LEFT_OUT = frozenset({"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"})


@dataclasses.dataclass(frozen=True)
class CorpusSummary:
    """The path and the size of a written corpus."""

    path: Path
    documents: int
    characters: int


def collect_stdlib(out_path: str | Path, *, library: str | Path | None = None) -> CorpusSummary:
    """Writes one JSON line `{"path": …, "text": …}` per module, sorted by path; about 10 MB in all.

    The file is written atomically.

    Args:
      out_path: the JSONL file to write.
      library: the folder to read; the running Python's standard library by default.
    """
    out_path = Path(out_path)
    root = Path(library or sysconfig.get_path("stdlib"))
    # Written under a temporary name and renamed at the end.
    partial = out_path.with_name(out_path.name + ".partial")

    documents = characters = 0
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        for name, text in _modules(root):
            stream.write(json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n")
            documents += 1
            characters += len(text)

    partial.replace(out_path)
    return CorpusSummary(path=out_path, documents=documents, characters=characters)


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    """Yields the relative path and the text of each module. Empty files and files that are not UTF-8 are skipped."""
    names = sorted(path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    for name in names:
        if _LEFT_OUT.isdisjoint(name.parts):
            try:
                text = (root / name).read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if text:
                yield name.as_posix(), text
