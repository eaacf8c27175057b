"""A tokenizer.json cannot expand a text without limit."""

import json

import pytest

from looplm_jax.data.tokenizers import deserialize
from looplm_jax.data.tokenizers._tokenizer_json import check_expansion
from looplm_jax.errors import UserError


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


HARMLESS = [
    {"normalizer": None},
    {"normalizer": sequence(replace(" ", "\u2581"), *[replace("，", ",")] * 40)},
    {"normalizer": sequence(*[replace(" {2,}", " ", "Regex")] * 40)},
    {"normalizer": replace("x", "")},
    {"decoder": replace("\u2581", " ")},
    [],
]
EXPLODING = [
    {"normalizer": replace("a", "a" * 2000)},
    {"normalizer": sequence(*[replace("a", "aa")] * 11)},
    {"normalizer": sequence(*[replace("x*", "a", "Regex")] * 11)},
    {"normalizer": sequence(*[replace("a", "aa")] * 6), "pre_tokenizer": sequence(*[replace("a", "aa")] * 6)},
    {"decoder": {"type": "Sequence", "decoders": [sequence(*[replace("a", "aaa")] * 9)]}},
]


@pytest.mark.parametrize("values", HARMLESS)
def test_what_tokenizers_do(values):
    check_expansion(json.dumps(values).encode())
    check_expansion(b"nonsense")


@pytest.mark.parametrize("values", EXPLODING)
def test_what_explodes(values):
    with pytest.raises(UserError, match=r"can make a text more than 1,024 times as long; use another tokenizer"):
        deserialize("tokenizer.json", json.dumps(values).encode())
