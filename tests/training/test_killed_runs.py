"""Real processes that are killed or stopped at any moment end bit for bit like an uninterrupted run."""

import dataclasses
import os
import pty
import random
import select
import signal
import sys
import time

import pytest
from etils import epath
from processes import hangups_are_not_ignored, running
from run_processes import ONE_DEVICE, PATIENCE, Run, metrics, newest, steps_logged, write_recipe
from training_cases import GATE, RECIPE, STAGE, assert_identical

from looplm_jax.checkpoints._step import list_steps
from looplm_jax.config import CheckpointConfig, EvaluationConfig, Objective, PolicyConfig, Stage

KILLS, LEAST_CUT_SHORT = 10, 3
BEFORE_TRAINING = (3, 7)  # kills while the process starts, compiles or restores
LONG = dataclasses.replace(
    RECIPE,
    stages=(dataclasses.replace(STAGE, steps=110), dataclasses.replace(GATE, steps=40)),
    checkpoint=CheckpointConfig(every=3, keep=2),
    evaluation=EvaluationConfig(every=25, sequences=8),
)
TOTAL = sum(stage.steps for stage in LONG.stages)

ANSWERS = dataclasses.replace(
    RECIPE,
    stages=(
        Stage(
            name="answers",
            objective=Objective.POLICY_GRADIENT,
            steps=5,
            batch_size=4,
            sequence_length=16,
            loops=2,
            learning_rate=1e-2,
            # The price of loops makes rewards of random answers differ.
            policy=PolicyConfig(answers=4, max_new_tokens=3, slots=8, loop_cost=0.5, kl_weight=0.1),
        ),
    ),
)

# A run that is killed when the answers of its fourth step are complete, before they become an update.
KILLED_WITH_ANSWERS = """
import os, pathlib, signal, sys, time
from looplm_jax.cli.main import main
from looplm_jax.training._feeds import RolloutFeed

place, calls = RolloutFeed.next, []
saved = pathlib.Path(sys.argv[sys.argv.index("--out") + 1], "checkpoints", "2")

def killed_at_the_fourth(feed, depths):
    calls.append(feed)
    if len(calls) == 4:
        while not saved.exists():  # a step is saved in the background
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return place(feed, depths)

RolloutFeed.next = killed_at_the_fourth
sys.exit(main())
"""

# Runs a command whose standard input is the terminal of its session, which gets SIGHUP when that is closed.
ON_ITS_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "long.json", LONG)


@pytest.fixture(scope="module")
def untouched(recipe, compiled_programs, tmp_path_factory):
    """Returns a run that was never stopped. The other runs use its compiled programs."""
    folder = tmp_path_factory.mktemp("untouched") / "run"
    with Run("--recipe", recipe, "--out", folder, errors=folder.with_name("errors"), compiled=compiled_programs) as run:
        assert run.finish() == 0, run.said
    return folder


def assert_same_end(folder, untouched, kinds=("train", "evaluation"), total=TOTAL):
    ours, wanted = newest(folder), newest(untouched)
    assert ours["step"] == wanted["step"] == total
    assert ours["data"] == wanted["data"]
    assert_identical(ours["state"], wanted["state"])
    assert metrics(folder, kinds) == metrics(untouched, kinds)
    assert [row["step"] for row in metrics(folder, ("train",))] == list(range(1, total + 1))


def unfinished_saves(folder):
    """Returns the folders of saves that a kill interrupted."""
    return [step for step in list_steps(epath.Path(folder / "checkpoints")) if not step.committed]


def wait_for_a_save(run, folder):
    """Waits until the process has started a save. From then on it is nearly always saving."""
    run.wait_until(lambda: "compiling" in run.said)  # by then the log ends at the step that was restored
    restored = steps_logged(folder)
    run.wait_until(lambda: steps_logged(folder) > restored + LONG.checkpoint.every)


def assert_stopped(run, number, step):
    assert run.finish() == 128 + number, run.said
    last = run.said.splitlines()[-1]
    assert last == f"looplm: stopped by {number.name} at step {step}; the same command resumes there"
    assert "Traceback" not in run.said


@pytest.mark.slow
def test_kills_leave_no_trace(recipe, untouched, compiled_programs, tmp_path):
    chance, folder, errors = random.Random(0), tmp_path / "run", tmp_path / "errors"
    cut_short, reached = 0, [0]
    for kill in range(KILLS):
        with Run("--recipe", recipe, "--out", folder, errors=errors, compiled=compiled_programs) as run:
            if kill in BEFORE_TRAINING:
                time.sleep(chance.uniform(0, 6))
            else:
                wait_for_a_save(run, folder)
                time.sleep(chance.uniform(0, 0.5))
            run.process.kill()
            assert run.finish() == -signal.SIGKILL, run.said
            assert "Traceback" not in run.said
        cut_short += bool(unfinished_saves(folder))
        reached.append(steps_logged(folder))
    assert cut_short >= LEAST_CUT_SHORT
    assert reached[-1] < TOTAL
    with Run("--recipe", recipe, "--out", folder, errors=errors) as run:  # without the compiled programs
        assert run.finish() == 0, run.said
    assert_same_end(folder, untouched)


@pytest.mark.slow
def test_a_kill_between_rollout_and_update_leaves_no_trace(compiled_programs, tmp_path):
    """The answers of the step are generated again, with the same tokens and exits."""
    recipe, errors = write_recipe(tmp_path / "answers.json", ANSWERS), tmp_path / "errors"
    untouched, folder = tmp_path / "untouched", tmp_path / "run"

    def start(out, program=""):
        arguments = ("--recipe", recipe, "--out", out)
        return Run(*arguments, errors=errors, compiled=compiled_programs, program=program)

    with start(untouched) as run:
        assert run.finish() == 0, run.said
    with start(folder, KILLED_WITH_ANSWERS) as run:
        assert run.finish() == -signal.SIGKILL, run.said
    assert steps_logged(folder) == 3
    with start(folder) as run:
        assert run.finish() == 0, run.said
        assert "resuming from step 2" in run.said
    assert_same_end(folder, untouched, kinds=("train",), total=5)
    assert max(row["gradient_norm"] for row in metrics(folder, ("train",))) > 0
    assert (folder / "rollouts.jsonl").read_bytes() == (untouched / "rollouts.jsonl").read_bytes()


@pytest.mark.slow
def test_stopped_runs_end_alike(recipe, untouched, compiled_programs, tmp_path):
    """Runs that are stopped during compilation, training or evaluation save their step and report it in one line."""
    folder, errors = tmp_path / "run", tmp_path / "errors"

    def stopped_by(number, ready, *arguments, compiled=compiled_programs):
        with Run("--recipe", recipe, "--out", folder, *arguments, errors=errors, compiled=compiled) as run:
            run.wait_until(lambda: ready(run))
            seconds = run.stop(number)
            assert run.finish() == 128 + number, run.said
        last = run.said.splitlines()[-1]
        assert (
            last == f"looplm: stopped by {number.name} at step {newest(folder)['step']}; the same command resumes there"
        )
        assert "Traceback" not in run.said
        return seconds

    # Nothing is compiled yet: this takes much longer than the process needs to end.
    seconds = stopped_by(signal.SIGTERM, lambda run: "compiling" in run.said, compiled=None)
    assert (newest(folder)["step"], steps_logged(folder)) == (0, 0)
    assert seconds < 10

    stopped_by(signal.SIGINT, lambda run: steps_logged(folder) >= 5)
    stopped_by(signal.SIGHUP, lambda run: steps_logged(folder) >= 10)
    assert newest(folder)["step"] == steps_logged(folder) >= 10

    # Evaluated after every step, on enough sequences that it evaluates nearly all the time.
    often = ("--evaluation.every", "1", "--evaluation.sequences", "3000")
    here = steps_logged(folder)
    stopped_by(signal.SIGTERM, lambda run: steps_logged(folder) > here, *often)
    step = newest(folder)["step"]
    assert step == here + 1
    assert all(row["step"] < step for row in metrics(folder, ("evaluation",)))

    with Run("--recipe", recipe, "--out", folder, errors=errors, compiled=compiled_programs) as run:
        assert run.finish() == 0, run.said
    assert_same_end(folder, untouched, kinds=("train",))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_is_stopped_while_it_trains_its_tokenizer(number, tmp_path):
    words = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(words.choices(alphabet, k=words.randint(2, 9))) for _ in range(50_000)]
    (tmp_path / "book.txt").write_text("\n\n".join(" ".join(words.choices(vocabulary, k=200)) for _ in range(6000)))
    arguments = ("--data", tmp_path / "book.txt", "--out", tmp_path / "run", "--model.vocab_size", "16384")
    with Run(*arguments, errors=tmp_path / "errors") as run:
        run.wait_until(lambda: "training a tokenizer" in run.said)
        seconds = run.stop(number)
        assert run.finish() == 128 + number, run.said
    assert seconds < 5
    assert run.said.splitlines()[-1] == f"looplm: stopped by {number.name} at step 0; the same command resumes there"
    assert "Traceback" not in run.said
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.json"}


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves(recipe, compiled_programs, tmp_path):
    """Once the terminal is closed, every write to it fails, and the operating system sends SIGHUP."""
    folder, (terminal, screen) = tmp_path / "run", pty.openpty()
    train = ["-m", "looplm_jax.cli.main", "train", "--recipe", recipe, "--out", folder]
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(compiled_programs), "XLA_FLAGS": ONE_DEVICE}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), screen)
    command = [sys.executable, "-c", ON_ITS_TERMINAL, sys.executable, *train]
    with hangups_are_not_ignored(), running(command, **streams, env={**os.environ, **compiled}) as process:
        os.close(screen)
        deadline = time.monotonic() + PATIENCE
        while steps_logged(folder) < 2 and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.01)[0]:
                os.read(terminal, 65536)
        os.close(terminal)
        assert process.wait(PATIENCE) == 128 + signal.SIGHUP
    assert newest(folder)["step"] == steps_logged(folder) >= 2


@pytest.mark.slow  # its short forms: test_signals, and test_training_session of the command
def test_a_second_interrupt_ends_a_run_at_once(recipe, tmp_path):
    with Run("--recipe", recipe, "--out", tmp_path / "run", errors=tmp_path / "errors") as run:
        run.wait_until(lambda: "compiling" in run.said)
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert run.stop(signal.SIGINT) < 10
        assert run.finish() == 128 + signal.SIGINT, run.said
    assert run.said.splitlines()[-1] == "looplm: interrupted"
    assert "Traceback" not in run.said
