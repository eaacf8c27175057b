"""A real corpus that needs no download: the source text, docstrings included, of this Python's standard library."""

import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Packages of others, tests, and data of tests, which are no text that anybody would learn from.
_LEFT_OUT = frozenset({"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"})


@dataclasses.dataclass(frozen=True)
class CorpusSummary:
    """What was written."""

    path: Path
    documents: int
    characters: int


def collect_stdlib(out_path: str | Path, *, library: str | Path | None = None) -> CorpusSummary:
    """Write one JSON line `{"path": …, "text": …}` for each module, sorted by path; about 10 MB.

    The file appears whole or not at all. `library` is the folder to read; this Python's standard library by default.
    """
    out_path = Path(out_path)
    root = Path(library or sysconfig.get_path("stdlib"))
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
    names = sorted(path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    for name in names:
        if _LEFT_OUT.isdisjoint(name.parts):
            try:
                text = (root / name).read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if text:
                yield name.as_posix(), text
