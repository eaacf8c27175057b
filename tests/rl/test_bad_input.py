"""Commands of reinforcement learning that cannot work: one line, exit status 2, and nothing written."""

import json

import pytest

from looplm_jax.cli.main import main

TASK = "addition:longest=4,digits=2,terms=4"


def refusal(capsys, out, *arguments):
    """Returns the last line on standard error. Before it, the run and the files that it reads are announced."""
    assert main(["train", *map(str, arguments), "--out", str(out), "--start.model", "false"]) == 2
    assert not out.exists()
    *before, line = capsys.readouterr().err.splitlines()
    assert all("writing to" in own or own.startswith("reading ") for own in before)
    assert line.startswith("looplm: ")
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stage.policy.exits q=0.5", "rewards exits that are drawn, so policy.exits must be sampled, not 'q=0.5'"),
        ("--stage.policy.exits sampled,max=2", "policy.exits must be sampled, not 'sampled,max=2'"),
        ("--stage.policy.exits sampled,min=2", "policy.exits must be sampled, not 'sampled,min=2'"),
        ("--stage.policy.credit trajectory", "rewards all loops, so policy.exits must be loops=3, not 'sampled'"),
        ("--stage.policy.answers 1", "policy.answers must be at least 2, because answers are compared"),
        ("--stage.loops 1", "there is one exit with one loop; set stages.policy.loops or policy.credit=token"),
        ("--stage.policy.loops_per_token 2", "policy.loops_per_token"),  # a budget would cut exits that are drawn
        ("--stage.policy.temperature 0.9", "policy.temperature"),  # the drawn distribution is the one that is updated
        ("--stage.policy.max_new_tokens 17", "leaves no room for a prompt in stages.policy.sequence_length=17"),
    ],
)
def test_settings_of_answers(flags, message, capsys, tmp_path):
    line = refusal(capsys, tmp_path / "run", "--recipe", "grpo-depth", "--data", TASK, *flags.split())
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stage.loops 1", "objective=looprpt compares loops with each other and needs at least 2"),
        ("--stage.looprpt.rollouts 1", "looprpt.rollouts must be at least 2, because rollouts are compared"),
    ],
)
def test_settings_of_looprpt(flags, message, capsys, tmp_path):
    line = refusal(capsys, tmp_path / "run", "--recipe", "looprpt-demo", "--data", TASK, *flags.split())
    assert message in line


@pytest.mark.parametrize("recipe", ["looprpt", "grpo"])
def test_a_problem_without_an_answer_is_named(recipe, capsys, tmp_path):
    path = tmp_path / "problems.jsonl"
    names = ("problem", "solution") if recipe == "looprpt" else ("prompt", "answer")
    records = [dict.fromkeys(names, "1"), {names[0]: "2"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    line = refusal(capsys, tmp_path / "run", "--recipe", recipe, "--scale", "tiny", "--data", path)
    assert f"problems.jsonl:2: the problem has no answer '{names[1]}'" in line
