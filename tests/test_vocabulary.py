"""The glossary of docs/design.md: one word for one thing, and American spelling."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("looplm_jax", "experiments", "tpu_setup", "docs", "README.md", "CONTRIBUTING.md")
# Left: what once was written for the word in the field. One match would bring the others back.
STOP_LIST = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(goes|going|go) on from\b": "resume from",
    r"\bnewest[ _]good\b": "latest valid",
    r"\bpassed[ _]over\b": "skipped",
    r"\bunder[ _]way\b": "running",
    r"\bkept[ _]cache\b": "prefix cache",
    r"\bsign[ _]of[ _]life\b": "heartbeat, or spinner",
    r"\b(whoever|whosoever|anew|besides)\b": "plain words",
    r"(optimis|tokenis|initialis|stabilis|normalis|utilis|summaris|recognis)(e|ed|er|ers|es|ing|ation)\b": "-ize",
    r"\b\w*colour\w*\b": "color",
}
DATA = ("experiments/results/", "looplm_jax/evaluation/tasks/", "looplm_jax/data/tasks/")  # not prose


def texts():
    listed = subprocess.run(["git", "ls-files", "--", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.splitlines() if name.endswith((".py", ".md", ".sh"))]
    return {name: (ROOT / name).read_text() for name in names if not name.startswith(DATA)}


@pytest.mark.parametrize("pattern", STOP_LIST)
def test_no_word_of_the_stop_list_returns(pattern):
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line, re.IGNORECASE)
    ]
    assert not found, f"write {STOP_LIST[pattern]!r}:\n" + "\n".join(found)


def test_the_stop_list_finds_its_words():
    said = (
        "mended; going on from; newest_good; passed over; under_way; kept cache; sign of life; anew; optimise; Colour"
    )
    assert all(re.search(pattern, said, re.IGNORECASE) for pattern in STOP_LIST)
