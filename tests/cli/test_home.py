"""`~` is expanded in paths of flags and recipes, which no shell expands."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from looplm_jax.cli._common import expand_paths
from looplm_jax.cli.main import main
from looplm_jax.codec import to_dict


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_paths_are_expanded_and_texts_are_not(home):
    given = argparse.Namespace(
        out="~/runs",
        data=["~/mine/*.jsonl", "gs://~/x", "here"],
        folder=Path("~/model"),
        tokenizer=None,
        prompt=["~/x"],
    )
    expand_paths(given)
    assert given == argparse.Namespace(
        out=f"{home}/runs",
        data=[f"{home}/mine/*.jsonl", "gs://~/x", "here"],
        folder=home / "model",
        tokenizer=None,
        prompt=["~/x"],
    )


def test_a_recipe_that_names_the_home_folder(home, recipe, capsys):
    data = dataclasses.replace(recipe.data, sources=(dataclasses.replace(recipe.data.sources[0], path="~/mine"),))
    (home / "mine.json").write_text(json.dumps(to_dict(dataclasses.replace(recipe, data=data))))
    assert main(["train", "--recipe=~/mine.json", "--data.tokenizer", "~/tokenizer.model", "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["data"]["sources"][0]["path"] == f"{home}/mine"
    assert shown["data"]["tokenizer"] == f"{home}/tokenizer.model"


def test_a_file_that_is_missing_at_home_is_named_with_its_folder(home, capsys):
    assert main(["generate", "~/run", "--prompt-file=~/prompt.txt"]) == 2
    assert capsys.readouterr().err == f"looplm: {home}/prompt.txt: No such file or directory\n"
