import dataclasses
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from tiny_chat import TOKENIZER, WORDS, make_loaded

from looplm_jax.cli import generate
from looplm_jax.cli._views import loop_color
from looplm_jax.cli.main import main
from looplm_jax.halting import parse_exit_policy
from looplm_jax.loading import load

PROMPT = "word1 word2 word3"
SAME = ("prompt", "text", "tokens", "exit_loops", "finished")


@pytest.fixture(scope="module")
def loaded():
    return make_loaded(max_positions=64)  # a single length bucket, so that programs are compiled once


@pytest.fixture(autouse=True)
def checkpoint(loaded, monkeypatch):
    """Makes every path except `none` a checkpoint of the tiny model."""
    asked = []

    def load_tiny(path, *, step, dtype):
        asked.append(dtype)
        return load(path, step=step, dtype=dtype) if path == "none" else loaded

    monkeypatch.setattr(generate, "load", load_tiny)
    return asked


@pytest.fixture
def in_color(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")


@pytest.fixture
def as_json(capsys):
    """Runs the command and returns the JSON that it printed."""

    def run(*arguments, prompts=(PROMPT,), status=0):
        flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
        assert main(["generate", "run", *flags, "--json", "--max-new-tokens", "12", *arguments]) == status
        values = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return values if len(prompts) > 1 else values[0]

    return run


def test_plain(capsys):
    assert main(["generate", "run", "--prompt", PROMPT, "--max-new-tokens", "9", "--exit", "loops=2"]) == 0
    printed = capsys.readouterr()
    *text, loops, summary, last = printed.out.splitlines()
    counts = loops.removeprefix("loops per token: ")
    assert set(counts) == {"2"}
    assert len(text) == 1
    assert f"{len(counts)} tokens, 2.00 loops per token on average" in summary
    assert last == f"next: looplm generate run --prompt '{PROMPT}' --exit q=0.5"
    assert printed.err == "looplm: step 9 is bad\n"


@pytest.mark.parametrize(("flags", "dtype"), [([], None), (["--dtype", "bfloat16"], "bfloat16")])
def test_the_type_of_the_parameters(checkpoint, capsys, flags, dtype):
    assert main(["generate", "run", "--prompt", PROMPT, "--max-new-tokens", "2", *flags]) == 0
    assert checkpoint == [dtype]
    assert main(["generate", "run", "--prompt", PROMPT, "--dtype", "float8"]) == 2
    assert "argument --dtype: invalid choice: 'float8'" in capsys.readouterr().err


def test_json(tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert main(["generate", "run", "--prompt-file", str(file), "--json", "--temperature", "1", "--seed", "5"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["pieces"] == [TOKENIZER.piece(token) for token in values["tokens"]]
    given = values["tokens"][:-1] if values["finished"] == "stop" else values["tokens"]
    assert values["text"].split() == TOKENIZER.decode(given).split()
    assert set(values["exit_loops"]) <= {1, 2, 3}
    assert (values["prompt"], values["prompt_tokens"]) == (PROMPT, 4)
    assert "previews" not in values


def test_in_color(in_color, capsys):
    assert main(["generate", "run", "--prompt", PROMPT, "--max-new-tokens", "4", "--exit", "q=0.5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("loops:")
    assert "\x1b[38;2;" in printed
    assert "loops per token on average" in printed
    assert "\b" not in printed


def test_several_prompts_are_answered_as_each_alone(as_json, capsys):
    prompts = [PROMPT, "word4"]
    values = as_json("--temperature", "1", prompts=prompts)
    assert [value["prompt"] for value in values] == prompts
    alone = [as_json("--temperature", "1", "--index", str(index), prompts=[own]) for index, own in enumerate(prompts)]
    assert [value["tokens"] for value in values] == [value["tokens"] for value in alone]
    assert main(["generate", "run", "--prompt", "word4", "--prompt", "word5", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("prompt: ")] == ["prompt: word4", "prompt: word5"]
    assert printed[-1].startswith("next: looplm generate run --prompt word4 --prompt word5 --exit ")


DRAFTED = ["--exit", "loops=3", "--draft-loops", "1"]


@pytest.mark.parametrize("flags", [[], pytest.param(DRAFTED, marks=pytest.mark.slow)])
def test_samples_of_a_prompt_are_drawn_anew(as_json, flags):
    values = as_json("--temperature", "1", "--samples", "3", *flags, prompts=[PROMPT, PROMPT])
    assert [(value["index"], value["sample"]) for value in values] == [(i, j) for i in range(2) for j in range(3)]
    assert len({tuple(value["tokens"]) for value in values}) == 6


def test_samples_of_greedy_text_are_refused(capsys):
    for flags, message in (
        (["--samples", "2"], "--samples needs --temperature above 0, such as 1: greedy texts are all the same"),
        (["--samples", "0"], "--samples must be at least 1, not 0"),
    ):
        assert main(["generate", "run", "--prompt", PROMPT, *flags]) == 2
        assert capsys.readouterr().err == f"looplm: {message}\n"


def test_a_budget_of_loops_is_kept(as_json):
    _, *others = as_json("--exit", "loops=3", "--loops-per-token", "1.5")["exit_loops"]  # the first is the prompt's
    assert len(others) < sum(others) <= 1.5 * len(others)
    assert as_json("--exit", "loops=3", "--ms-per-token", "1e-9")["exit_loops"][-1] == 1


def test_a_stop_string_ends_the_text_before_it(as_json):
    whole = as_json()
    stop = whole["pieces"][4]
    cut = as_json("--stop", "no such text", "--stop", stop)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finished"] == "stop"


@pytest.mark.parametrize(
    ("common", "flags"),
    [
        (["--temperature", "1"], ["--min-p", "0.9"]),
        (["--temperature", "1"], ["--top-k", "2"]),
        (["--temperature", "1"], ["--top-p", "0.2"]),
        ([], ["--repetition-penalty", "1e9"]),
        ([], ["--cache", "last"]),
    ],
)
def test_flags_reach_the_engine(common, flags, as_json):
    assert as_json(*common, *flags)["log_probs"] != as_json(*common)["log_probs"]


def test_drafts_change_no_token(as_json, capsys):
    """Greedy text is that of the verifying loops, and so are its end and its stop strings."""
    drafts = ["--exit", "loops=3", "--draft-loops", "2", "--drafts", "2"]
    prompts = [PROMPT, "word4"]
    expected = as_json("--exit", "loops=3", prompts=prompts)
    for value, own in zip(as_json(*drafts, prompts=prompts), expected, strict=True):
        assert [value[name] for name in SAME] == [own[name] for name in SAME]
        np.testing.assert_allclose(value["log_probs"], own["log_probs"], atol=1e-4)
    stop = expected[0]["pieces"][4]
    cut = as_json(*drafts, "--stop", stop, prompts=prompts)[0]
    assert (cut["text"], cut["finished"]) == (expected[0]["text"].split(stop)[0], "stop")
    assert main(["generate", "run", "--prompt", PROMPT, "--prompt", "word4", "--max-new-tokens", "12", *drafts]) == 0
    printed = capsys.readouterr()
    assert re.search(
        r"^\d+ of \d+ drafts accepted; \d\.\d\d passes of the stack a token instead of 3$", printed.out, re.M
    )
    assert printed.err == "looplm: step 9 is bad\n"


def test_drafts_are_given_out_as_they_are_accepted(as_json, monkeypatch):
    """Ctrl-C in between keeps the text so far."""
    drafts = ["--exit", "loops=3", "--draft-loops", "2", "--drafts", "2"]
    prompts = [PROMPT, "word4"]
    whole = as_json(*drafts, prompts=prompts)
    seen = []

    def interrupt(*_):
        seen.append(True)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(generate.Stopwatch, "tick", interrupt)
    values = as_json(*drafts, prompts=prompts, status=130)
    assert [value["finished"] for value in values] == ["cancelled"] * 2
    for value, own in zip(values, whole, strict=True):
        assert 0 < len(value["tokens"]) <= 2
        assert own["text"].startswith(value["text"])


def test_previews_in_json(as_json):
    values = as_json("--revise", "--exit", "loops=3")
    assert values["tokens"] == as_json("--exit", "loops=3")["tokens"]
    first, *others = values["previews"]  # the first token comes from the prefill, which runs all loops
    assert first == []
    assert [len(pieces) for pieces in others] == [3] * len(others)
    assert [pieces[-1] for pieces in others] == values["pieces"][1:]


def test_revision_on_a_terminal(in_color, as_json, capsys):
    text = as_json("--exit", "loops=3")["text"]
    assert main(["generate", "run", "--prompt", PROMPT, "--max-new-tokens", "12", "--exit", "loops=3", "--revise"]) == 0
    _, *shown, summary, _ = capsys.readouterr().out.splitlines()
    assert "\b" in "".join(shown)
    assert as_seen("\n".join(shown)) == PROMPT + text
    assert "loops per token on average" in summary


def as_seen(printed):
    """Returns what a terminal shows after these characters."""
    cells, place = [], 0
    for character in re.sub(r"\x1b\[[0-9;]*m", "", printed):
        if character == "\b":
            place -= 1
        else:
            cells[place : place + 1] = [character]
            place += 1
    return "".join(cells).rstrip()


@pytest.mark.parametrize("form", ["plain", "json"])
def test_an_interruption_keeps_the_text(form, as_json, monkeypatch, capsys):
    whole = as_json("--exit", "loops=1", "--stop", "nothing")
    tokens = 0

    def interrupt(*_):
        nonlocal tokens
        tokens += 1
        if tokens == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(generate.Stopwatch, "tick", interrupt)
    before = signal.getsignal(signal.SIGINT)
    if form == "json":
        values = as_json("--exit", "loops=1", status=130)
        assert values["finished"] == "cancelled"
        assert 3 <= len(values["tokens"]) < 12
        assert whole["text"].startswith(values["text"])
    else:
        arguments = ["--prompt", PROMPT, "--prompt", "word4", "--max-new-tokens", "40", "--exit", "loops=1"]
        assert main(["generate", "run", *arguments]) == 130
        printed = capsys.readouterr().out
        assert printed.count("; interrupted") == 2
        assert "next:" not in printed
    assert signal.getsignal(signal.SIGINT) is before


def test_damaged_parameters_are_a_mistake_in_one_line(loaded, monkeypatch, capsys):
    broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), loaded.params)
    damaged = dataclasses.replace(loaded, params=broken)
    monkeypatch.setattr(generate, "load", lambda path, *, step, dtype: damaged)
    assert main(["generate", "run", "--prompt", PROMPT, "--max-new-tokens", "4"]) == 2
    printed = capsys.readouterr()
    assert "0 tokens, 0.00 loops per token on average; failed" in printed.out
    assert "next:" not in printed.out
    assert printed.err.endswith("logits were not finite; the parameters are damaged, or overflow\n")


def test_colors_distinguish_depths():
    for loops in (1, 2, 4, 8):
        assert len({loop_color(loop, loops) for loop in range(1, loops + 1)}) == loops


def test_every_exit_rule_of_the_help_is_one(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    _, rules = capsys.readouterr().out.split("exit rules, ")
    examples = re.findall(r"^  (\S+)", rules, flags=re.MULTILINE)
    assert len({type(parse_exit_policy(example)) for example in examples}) == len(examples) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", WORDS[0], "--exit", "q=1.5"], "q must be in [0, 1], not 1.5"),
        (["--prompt", WORDS[0], "--exit", "loops=0"], "loops must be at least 1, not 0"),
        (["--prompt", WORDS[0], "--exit", "guess=1"], "unknown exit policy 'guess=1'; write for example q=0.5"),
        (["--prompt", WORDS[0], "--temperature", "-1"], "temperature must not be negative, not -1.0"),
        (["--prompt", WORDS[0], "--min-p", "2"], "min_p must be in [0, 1], not 2.0"),
        (["--prompt", WORDS[0], "--repetition-penalty", "0"], "repetition_penalty must be positive, not 0.0"),
        (["--prompt", WORDS[0], "--loops-per-token", "0.5"], "loops_per_token must be at least 1, not 0.5"),
        (["--prompt", WORDS[0], "--ms-per-token", "0"], "milliseconds_per_token must be positive, not 0"),
        (["--prompt", WORDS[0], "--stop", ""], "a stop string is empty"),
        (["--prompt", WORDS[0], "--cache", "none"], "argument --cache: unknown cache 'none'"),
        (
            ["--prompt", WORDS[0], "--draft-loops", "1"],
            "--draft-loops drafts for a fixed number of loops; add for example --exit loops=4",
        ),
        (
            ["--prompt", WORDS[0], "--exit", "loops=3", "--draft-loops", "1", "--revise"],
            "--revise cannot be combined with --draft-loops; leave one of them out",
        ),
        (
            ["--prompt", WORDS[0], "--exit", "loops=3", "--draft-loops", "1", "--cache", "last"],
            "--draft-loops needs --cache full: each loop reads keys and values of its own",
        ),
        (["--prompt", WORDS[0], "--exit", "loops=3", "--draft-loops", "3"], "draft_loops must be in 1..2"),
        (["--prompt", ""], "the prompt is empty; give --prompt TEXT or --prompt-file FILE"),
        (["--prompt", WORDS[0], "--prompt", ""], "the prompt is empty; give --prompt TEXT or --prompt-file FILE"),
        ([], "the prompt is empty; give --prompt TEXT or --prompt-file FILE"),
        (["--prompt", f"{WORDS[0]} " * 200], "201 tokens of prompt and 128 new ones are beyond"),
        (["--prompt", WORDS[0], "--max-new-tokens", "0"], "max_new_tokens must be at least 1, not 0"),
        (["--prompt-file", "missing.txt"], "missing.txt: No such file or directory"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "run", *arguments]) == 2
    printed = capsys.readouterr()
    *_, last = printed.err.splitlines()
    assert message in last
    assert (printed.out, list(tmp_path.iterdir())) == ("", [])


def test_what_is_no_checkpoint(capsys):
    assert main(["generate", "none", "--prompt", WORDS[0]]) == 2
    assert "none is not a checkpoint" in capsys.readouterr().err


def test_a_prompt_file_that_is_not_text(tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert main(["generate", "run", "--prompt-file", str(tmp_path / "prompt")]) == 2
    assert "is not UTF-8 text; convert it" in capsys.readouterr().err
