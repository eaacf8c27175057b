import dataclasses
import json
import sys

import pytest
from hf_folders import MULTI_HEAD, write_hf_folder

pytest.importorskip("lm_eval")
pytest.importorskip("tokenizers")

from lm_eval.tasks import manager

from looplm_jax.cli.main import main
from looplm_jax.evaluation.harness import __main__ as harness
from looplm_jax.evaluation.harness import _adapter
from looplm_jax.evaluation.harness._adapter import LoopLMAdapter
from looplm_jax.evaluation.harness._running import TaskRun, task_table

TASK = """\
task: colours_of_my_own
include: {choice}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_hf_folder(path, dataclasses.replace(MULTI_HEAD, num_layers=1))
    return str(path)


@pytest.fixture(autouse=True)
def no_other_tasks(monkeypatch, tmp_path):
    """Skips the harness's own tasks: thousands of files, which take nine seconds to index."""
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "none" / "manager.py"))


@pytest.fixture
def evaluate(folder, tmp_path, capsys):
    """Runs the command. Returns the file that it wrote and its output."""

    def run(*arguments, file="tasks.json"):
        assert main(["evaluate", folder, "--out", str(tmp_path / "out"), "--limit", "1", *arguments]) == 0
        return json.loads((tmp_path / "out" / file).read_text()), capsys.readouterr().out

    return run


@pytest.mark.slow
def test_both_commands_run_the_tasks_alike(evaluate, folder, tmp_path, monkeypatch):
    values, printed = evaluate("--tasks", "looplm_smoke", "--loops", "2")
    assert {"looplm_smoke_choice", "looplm_smoke_text", "looplm_smoke_continue"} <= set(values["results"])
    assert values["exit"] == "loops=2"
    assert values["mean_loops"] == 2
    assert "mean loops of a token: 2.00" in printed
    assert f"wrote {tmp_path / 'out' / 'tasks.json'}" in printed
    assert printed.splitlines()[-1] == f"next: looplm evaluate {folder} --tasks looplm_smoke --limit 1 --depth-sweep"

    words = ["run", "--model", "looplm", "--model_args", f"checkpoint={folder}", "exit=loops=2", "--limit", "1"]
    words += ["--tasks", "looplm_smoke", "--batch_size", "8", "--output_path", str(tmp_path / "theirs.json")]
    monkeypatch.setattr(sys, "argv", ["harness", *words])
    assert harness.main() == 0
    (theirs,) = tmp_path.glob("theirs*.json")
    for task, metrics in json.loads(theirs.read_text())["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                assert value == pytest.approx(values["results"][task][name], rel=1e-6)


@pytest.mark.slow
def test_a_sweep_has_a_column_for_every_depth(evaluate):
    tasks = ("--tasks", "looplm_smoke_choice,looplm_smoke_t*")
    sweep, printed = evaluate(*tasks, "--depth-sweep", "--max-loops", "4", "--num-fewshot", "1")
    assert "4 (trained)" in printed
    assert "--exit q=0.5" in printed.splitlines()[-1]
    fixed, _ = evaluate(*tasks, "--loops", "3", "--num-fewshot", "1", file="tasks-2.json")
    assert list(sweep["depths"]) == ["1", "2", "3", "4"]
    assert sweep["depths"]["3"]["results"]["looplm_smoke_text"]["bits_per_byte,none"] == pytest.approx(
        fixed["results"]["looplm_smoke_text"]["bits_per_byte,none"], rel=1e-5
    )
    choices = [depth["results"]["looplm_smoke_choice"] for depth in (sweep["depths"]["3"], fixed)]
    assert choices[0]["acc,none"] == choices[1]["acc,none"]


def test_names_of_special_tokens_become_tokens_where_the_flag_says_so(evaluate, monkeypatch):
    read = []

    class Adapter(LoopLMAdapter):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            read.append(self.tok_encode("<|im_end|>"))

    monkeypatch.setattr(_adapter, "LoopLMAdapter", Adapter)
    evaluate("--tasks", "looplm_smoke_choice", "--loops", "1")
    evaluate("--tasks", "looplm_smoke_choice", "--loops", "1", "--special-tokens", file="tasks-2.json")
    assert len(read[0]) > 1
    assert read[1] == [2]


def test_numbers_and_filters_in_a_table():
    metrics = {"alias": "a", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "word_perplexity,none": 1e7}
    table = task_table(TaskRun(results={"results": {"a": metrics}}), "tasks")
    assert table.rows == [["a", "exact_match (strict)", "0.5000", "0.1000"], ["a", "word_perplexity", "1.000e+07", ""]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "looplm_smok"], "unknown task 'looplm_smok'; did you mean 'looplm_smoke'?"),
        (["--tasks", "nothing*"], "unknown task 'nothing*'; `lm_eval ls tasks` lists them"),
        (["--tasks", ","], "--tasks names no task; give for example --tasks looplm_smoke"),
        (["--tasks", "x", "--include-path", "missing"], "--include-path missing is not a folder"),
        (["--tasks", "x", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["--tasks", "x", "--num-fewshot", "-1"], "--num-fewshot must not be negative, not -1"),
        (["--tasks", "x", "--loops", "0"], "loops must be at least 1, not 0"),
        (["--tasks", "x", "--exit", "p=1"], "unknown exit policy 'p=1'"),
        (["--tasks", "x", "--exit", "q=1", "--depth-sweep"], "--depth-sweep: not allowed with argument --exit"),
        (["--tasks", "x", "--max-loops", "3"], "--max-loops is for --depth-sweep here; use --loops"),
        (["--tasks", "x", "--sequences", "3"], "--sequences is for held-out documents: leave it or --tasks out"),
        (["--limit", "3"], "--limit is for tasks: give --tasks too"),
        (["--add-bos-token"], "--add-bos-token is for tasks: give --tasks too"),
        (["--special-tokens"], "--special-tokens is for tasks: give --tasks too"),
        (["--tasks", "looplm_smoke_continue", "--max-length", "8"], "8 new tokens leave no room for a prompt in the 8"),
    ],
)
def test_mistakes_end_in_one_line(folder, arguments, message, capsys, tmp_path):
    assert main(["evaluate", folder, "--out", str(tmp_path / "out"), *arguments]) == 2
    *_, line = capsys.readouterr().err.splitlines()  # after the harness's progress bars, if tqdm was imported before
    assert line.startswith("looplm: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_tasks_of_ones_own_are_found(folder, tmp_path, capsys):
    choice = harness.TASKS / "looplm_smoke_choice.yaml"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "colours.yaml").write_text(TASK.format(choice=choice))
    (tmp_path / "own" / "broken.yaml").write_text("task: broken\ncustom_dataset: !function nowhere.load\n")
    arguments = ["evaluate", folder, "--include-path", str(tmp_path / "own"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--tasks", "colours_of_my_own", "--limit", "1"]) == 0
    assert "colours_of_my_own" in capsys.readouterr().out
    assert main([*arguments, "--tasks", "broken"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "looplm: cannot load broken: " in line


def test_the_harness_says_mistakes_in_one_line_too(folder, capsys, monkeypatch):
    words = ["run", "--model", "looplm", "--model_args", f"checkpoint={folder},exit=q=2", "--tasks", "looplm_smoke"]
    monkeypatch.setattr(sys, "argv", ["harness", *words])
    assert harness.main() == 2
    assert "looplm: q must be in [0, 1], not 2" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [lambda: main(["evaluate", "x", "--tasks", "looplm_smoke"]), harness.main])
def test_without_lm_eval(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command() == 2
    assert capsys.readouterr().err == "looplm: tasks need lm_eval; pip install 'looplm_jax[eval]'\n"
