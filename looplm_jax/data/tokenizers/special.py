"""Detection of special tokens, which structure a text and are not text themselves, by their names."""

import re
from collections.abc import Iterable

# `<|name|>`, the form of ChatML, GPT, Llama and others, and the same with the full-width bars of DeepSeek.
_MARKED = re.compile(r"<[|｜][^<>\s]+[|｜]>")

_NAMES = frozenset(
    (
        *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<sep>", "<cls>"),
        *("[BOS]", "[EOS]", "[PAD]", "[UNK]", "[MASK]", "[SEP]", "[CLS]"),
        *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    )
)


def is_special_name(piece: str) -> bool:
    """Whether a token with this name is special, even if its vocabulary does not mark it."""
    return piece in _NAMES or _MARKED.fullmatch(piece) is not None


def is_unknown_name(piece: str) -> bool:
    """Whether a token with this name represents unknown text and nothing else."""
    return "unk" in piece.lower() or not is_special_name(piece)


def special_names(pieces: Iterable[str]) -> frozenset[str]:
    """Returns the pieces that are names of special tokens."""
    return frozenset(filter(is_special_name, pieces))
