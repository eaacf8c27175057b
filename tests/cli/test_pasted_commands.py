"""A command that is printed as the next step can be pasted into a shell, for any folder name."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.cli.main import main
from looplm_jax.evaluation._reports import evaluate_command
from looplm_jax.files import any_path, quoted

ODD = "runs/-my run #1[2] $x 100%"


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1))
def test_a_pasted_path_is_the_same_path_and_no_flag(path):
    (word,) = shlex.split(f" {quoted(path)} ")
    assert word in (path, f"./{path}")
    assert not word.startswith("-")


def test_the_evaluation_of_a_run_in_a_bucket_is_written_to_a_folder_here():
    pytest.importorskip("gcsfs")
    words = shlex.split(evaluate_command(any_path("gs://bucket/my run")))
    assert words == ["looplm", "evaluate", "gs://bucket/my run", "--out", "my run-evaluation"]


def test_a_run_of_any_name_is_trained_and_its_next_command_pasted(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", str(recipe_file), "--out", ODD]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last) == ["next:", "looplm", "evaluate", ODD]
    assert f"looplm generate {shlex.quote(ODD)} --prompt 'Once'" in (tmp_path / ODD / "report.md").read_text()
    assert main(["inspect", ODD]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1]) == ["next:", "looplm", "evaluate", ODD]


@pytest.mark.parametrize("name", ["../x", "/etc", "", "..", ".", "a/b"])
def test_the_name_of_a_recipe_cannot_leave_the_folder_of_runs(recipe_file, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", str(recipe_file), f"--name={name}"]) == 2
    assert capsys.readouterr().err == (
        f"looplm: the recipe's name {name!r} is not that of a folder; say --out, or set another --name\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["runs/a\\b", "runs/\udcff"])
def test_a_folder_that_keeps_no_checkpoints_is_refused_before_the_first_step(recipe_file, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", str(recipe_file), "--out", name]) == 2
    assert not list(tmp_path.iterdir())
