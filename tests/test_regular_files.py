"""Small files that commands read must be regular files in UTF-8, with or without a byte order mark."""

import json
import os

import pytest

from looplm_jax.codec import to_dict
from looplm_jax.data.tokenizers import load_tokenizer
from looplm_jax.errors import UserError
from looplm_jax.files import check_regular, read_text
from looplm_jax.recipes import named_recipe
from looplm_jax.training._metrics import read_metrics
from looplm_jax.training._run_folder import read_recipe


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "recipe.json"
    recipe = named_recipe("text-small")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(to_dict(recipe)).encode())
    assert read_recipe(path) == recipe
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(path) == "hello"
    path.write_bytes("hello".encode("utf-16"))
    with pytest.raises(UserError, match="is not UTF-8 text; convert it"):
        read_text(path)


def test_a_recipe_that_is_nested_too_deep(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match="is not a recipe: its JSON is nested too deep"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("recipe.json", read_recipe),
        ("t.model", lambda path: load_tokenizer(str(path))),
        ("tokenizer.json", lambda path: load_tokenizer(str(path))),
        ("metrics.jsonl", lambda path: read_metrics(path.parent)),
    ],
)
def test_pipes_and_devices_are_refused_at_once(tmp_path, name, read):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file; give a regular file"):
        read(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"{name} is a device, not a file"):
        read(path)
    check_regular(tmp_path)
    check_regular(tmp_path / "missing")
