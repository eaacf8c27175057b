import json
import subprocess
import sys

import pytest

import looplm_jax.data
from looplm_jax.data import Message, collect_stdlib, tokens_and_mask
from looplm_jax.data._examples import render
from looplm_jax.data.tokenizers import SymbolTokenizer
from looplm_jax.errors import UserError

CHAT = [Message("user", "loop?"), Message("assistant", "state"), Message("user", "<|im_end|>")]


def test_render():
    assert render(CHAT[:2]) == "<|im_start|>user\nloop?<|im_end|>\n<|im_start|>assistant\nstate<|im_end|>\n"


def test_only_the_assistant_is_supervised(tokenizer):
    example = tokens_and_mask(CHAT, tokenizer)
    assert example.tokens[example.loss_mask].tolist() == [*tokenizer.encode("state"), tokenizer.token_id("<|im_end|>")]
    assert tokenizer.decode(example.tokens) == "user\nloop?\nassistant\nstate\nuser\n<|im_end|>\n"


def test_names_inside_a_message_end_no_turn(tokenizer):
    tokens = tokens_and_mask(CHAT, tokenizer).tokens.tolist()
    assert tokens.count(tokenizer.token_id("<|im_end|>")) == 3


def test_tokenizer_without_chat_tokens():
    with pytest.raises(UserError, match=r"the tokenizer has no token <\|im_start\|>"):
        tokens_and_mask(CHAT, SymbolTokenizer(["a"]))


def test_collect_stdlib(tmp_path):
    library = tmp_path / "library"
    files = {
        "b.py": "b = 'é'\r\n",
        "a/x.py": "x = 1\n",
        "a/empty.py": "",
        "a/tests/t.py": "no",
        "test/t.py": "no",
        "idlelib/idle_test/t.py": "no",
        "site-packages/p.py": "no",
        "lib2to3/f.py": "no",
        "readme.txt": "no",
    }
    for name, text in files.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(text.encode())
    (library / "latin.py").write_bytes(b"# \xe9\n")
    summary = collect_stdlib(tmp_path / "out.jsonl", library=library)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"path": "a/x.py", "text": "x = 1\n"},
        {"path": "b.py", "text": "b = 'é'\r\n"},
    ]
    assert (summary.documents, summary.characters) == (2, 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["library", "out.jsonl"]


def test_this_pythons_library(tmp_path):
    summary = collect_stdlib(tmp_path / "out.jsonl")
    assert summary.documents > 300
    assert 5_000_000 < summary.characters < 30_000_000


def test_every_public_name_exists():
    assert set(looplm_jax.data.__all__) == set(looplm_jax.data.__getattr__.keywords["imported_symbols"])
    for name in looplm_jax.data.__all__:
        assert getattr(looplm_jax.data, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        looplm_jax.data.nonsense  # noqa: B018


def test_import_is_light():
    program = (
        "import sys, looplm_jax.data; print([m for m in ('grain', 'jax', 'pyarrow', 'tokenizers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
