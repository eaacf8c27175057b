"""Which tokens of a vocabulary are special: they structure a text and are not text themselves."""

import re
from collections.abc import Iterable

# `<|name|>`, as ChatML, GPT, Llama and others write special tokens, also with the wide bars of DeepSeek.
_MARKED = re.compile(r"<[|｜][^<>\s]+[|｜]>")

_NAMES = frozenset(
    (
        *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<sep>", "<cls>"),
        *("[BOS]", "[EOS]", "[PAD]", "[UNK]", "[MASK]", "[SEP]", "[CLS]"),
        *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    )
)


def is_special_name(piece: str) -> bool:
    """Whether a token of this name is special, also in a vocabulary that does not call it so."""
    return piece in _NAMES or _MARKED.fullmatch(piece) is not None


def is_unknown_name(piece: str) -> bool:
    """Whether a token of this name stands for unknown text and nothing else."""
    return "unk" in piece.lower() or not is_special_name(piece)


def special_names(pieces: Iterable[str]) -> frozenset[str]:
    """Those of the pieces that are names of special tokens."""
    return frozenset(filter(is_special_name, pieces))
