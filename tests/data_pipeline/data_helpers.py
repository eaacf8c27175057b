"""Small corpora for the tests of this folder."""

import json

TEXT = "the loop reads state and gate of a layer then exits when depth is enough for one more token"
WORDS = tuple(TEXT.split())


def make_texts(count: int, words: int = 40) -> list[str]:
    """Returns distinct documents of different lengths."""
    return [
        f"Document {n}.\n" + " ".join(WORDS[(n * 7 + k * (n % 5 + 1)) % len(WORDS)] for k in range(n % words + 1))
        for n in range(count)
    ]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
