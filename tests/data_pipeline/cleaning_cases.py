"""Texts for the cleaning tests."""

import json
from pathlib import Path

from hypothesis import strategies as st

from looplm_jax.corpus import EvaluationNgrams, load_evaluation_ngrams

SCRIPTS = "abcdeéßøжщωनमस्ते한글אב中文字假名カナไทยក"
SEPARATORS = (" ", ", ", "\n\n", " - ", "; “", "\t", "… (", "/")


def word_lists(alphabet: str = SCRIPTS, least: int = 8, most: int = 60) -> st.SearchStrategy[list[str]]:
    """Draws lists of words from a few letters."""
    return st.lists(st.text(alphabet, min_size=1, max_size=6), min_size=least, max_size=most)


def evaluation(folder: Path, *items: str, n: int = 13) -> EvaluationNgrams:
    """Returns the n-grams of items of one text each."""
    path = folder / "evaluation.jsonl"
    path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
    return load_evaluation_ngrams([str(path)], n)
