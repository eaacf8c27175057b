import dataclasses
import io
import os
import signal
import sys

import pytest
from hf_folders import tokenizer_json
from tiny_chat import make_loaded

from looplm_jax.cli import chat as chat_command
from looplm_jax.cli.main import main
from looplm_jax.data.tokenizers import FolderTokenizer, SymbolTokenizer, TokenIds
from looplm_jax.inference import Conversation

TURN = ["text", "loops", "summary"]


@pytest.fixture(scope="module")
def loaded():
    return make_loaded(max_positions=64)


@pytest.fixture
def chat(loaded, monkeypatch, capsys):
    """Types lines into a chat with the tiny model. Returns the exit status and the lines of both outputs."""

    def run(*lines, flags=(), by_hand=False, model=loaded):
        text = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(sys, "stdin", text)
        monkeypatch.setattr(text, "isatty", lambda: by_hand)
        monkeypatch.setattr(chat_command, "load", lambda path, *, step, dtype: model)
        status = main(["chat", "run", "--max-new-tokens", "6", *flags])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), [line for line in printed.err.splitlines() if "step 9" not in line]

    return run


def test_a_chat_from_a_pipe(chat):
    status, printed, errors = chat("word1", "", "  word2 word3 ", flags=["--exit", "loops=2", "--system", "word9"])
    assert (status, errors) == (0, [])
    assert len(printed) == 2 * len(TURN)
    for _, loops, summary in (printed[:3], printed[3:]):
        assert set(loops.removeprefix("loops per token: ")) == {"2"}
        assert "2.00 loops per token on average" in summary


def test_a_turn_knows_those_before_it_until_a_reset(chat):
    alone = chat("word2")[1]
    assert chat("word1", "/reset", "word2")[1][len(TURN) :][:2] == alone[:2]
    prompted = chat("word2", flags=["--system", "word7 word8"])[1]
    assert prompted[:2] != alone[:2]
    assert chat("word1", "word2")[1][len(TURN) :][:2] != alone[:2]


def test_exit_rules_on_the_way(chat):
    _, printed, _ = chat("word1", "/loops 1", "word2", "/exit-rule q=1,max=2", "word3", "/exit", "word4")
    loops = [set(line.removeprefix("loops per token: ")) for line in printed[1::3]]
    assert loops[1:] == [{"1"}, {"2"}]
    assert len(printed) == 3 * len(TURN)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "unknown command /rest; did you mean '/reset'?"),
        ("/loops", "exit policy 'loops=': '' is not a whole number; write for example loops=4"),
        ("/loops 9", "9 loops are more than the 3 that this chat was started for; start it with --exit loops=9"),
        ("/exit-rule 3", "unknown exit policy '3'; write for example q=0.5"),
        ("hello", "'hello' is not in the vocabulary of symbols"),
        ("word1 " * 60, "the window of 64 tokens is full: 0 of the conversation and 65 of this message"),
    ],
)
def test_a_mistake_is_one_line_and_the_chat_goes_on(line, message, chat):
    status, printed, (error,) = chat(line, "word1")
    assert (status, len(printed)) == (2, len(TURN))
    assert error.startswith(f"looplm: {message}")


def test_a_window_that_fills_up_says_how_to_go_on(chat):
    line = "word1 " * 15
    status, printed, (error,) = chat(*[line] * 3, "/reset", line, flags=["--window", "64"])
    assert status == 2
    assert error.startswith("looplm: the window of 64 tokens is full: ")
    assert error.endswith("reset the conversation, or give it a larger window")
    assert printed[-3:-1] == printed[:2]


def test_by_hand_and_in_color(chat, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    status, printed, (*_, error) = chat("word1", "/help", "/nothing", by_hand=True)
    assert status == 0  # an interactive error was reported and does not end the chat with a failure
    assert printed[0] == "/help lists the commands, Ctrl-D ends"
    assert printed[1].startswith("loops:")
    assert "\x1b[38;2;" in printed[2]
    assert "loops per token on average" in printed[3]
    assert any("/exit-rule RULE" in line for line in printed)
    assert "looplm: unknown command /nothing; known: /exit, " in error


@pytest.mark.parametrize("by_hand", [True, False])
def test_an_interruption_ends_the_answer(by_hand, chat, monkeypatch):
    say = Conversation.say

    def interrupted(self, text, **options):
        for number, new in enumerate(say(self, text, **options)):
            if text == "word1" and number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield new

    monkeypatch.setattr(Conversation, "say", interrupted)
    status, printed, _ = chat("word1", "word2", by_hand=by_hand, flags=["--exit", "loops=3"])
    assert status == (0 if by_hand else 130)
    ends = [line.partition("; ")[2] for line in printed if "on average" in line]
    assert ends[0] == "interrupted"
    assert len(ends) == (2 if by_hand else 1)


def test_a_tokenizer_without_chat(chat, loaded):
    words = SymbolTokenizer([f"word{number}" for number in range(loaded.tokenizer.vocab_size)])
    status, printed, (error,) = chat("word1", model=dataclasses.replace(loaded, tokenizer=words))
    assert (status, printed) == (2, [])
    assert error.startswith("looplm: the tokenizer has no token <|im_start|>, which the chat format needs; use one")


@pytest.mark.parametrize(
    ("template", "notes"),
    [
        ("[INST] {{ messages }}", ["looplm: note: the chat template of this model is not ChatML, but this chat is;"]),
        ("<|im_start|>{{ messages }}", []),
    ],
)
def test_a_template_that_is_not_chatml_is_named(chat, template, notes):
    pytest.importorskip("tokenizers")
    ids = TokenIds(bos=0, eos=0, pad=None, stop=(0,))
    tokenizer = FolderTokenizer.of(tokenizer_json(272), ids, {"chat_template.jinja": template})
    status, printed, errors = chat(model=make_loaded(tokenizer, max_positions=64))
    assert (status, printed) == (0, [])
    assert [error.removesuffix(" answers may suffer") for error in errors] == notes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", "65"], "--window must be in 1..64, the positions of the model, not 65"),
        (["--window", "0"], "--window must be in 1..64, the positions of the model, not 0"),
        (["--exit", "q=2"], "q must be in [0, 1], not 2.0"),
    ],
)
def test_flags_that_cannot_be(flags, message, chat):
    status, printed, (error,) = chat("word1", flags=flags)
    assert (status, printed, error) == (2, [], f"looplm: {message}")


def test_input_that_is_not_text(chat, monkeypatch, capsys, loaded):
    monkeypatch.setattr(chat_command, "load", lambda path, *, step, dtype: loaded)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert main(["chat", "run"]) == 2
    assert capsys.readouterr().err.endswith("looplm: the input is not UTF-8 text; convert it\n")
