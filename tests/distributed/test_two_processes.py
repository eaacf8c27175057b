"""Two real processes on one machine: a single run, even if one of them fails."""

import functools
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from gcs_emulator import bucket, gcs  # noqa: F401
from many_processes import Processes, losses, steps_logged, write_recipe

from looplm_jax.checkpoints import inspect_steps
from looplm_jax.cli import train as train_command
from looplm_jax.cli.main import main
from looplm_jax.files import any_path
from looplm_jax.training import read_metrics

TWO = ([], [])


@pytest.fixture(scope="module")
def compiled():
    """Returns the folder of compiled programs of this test session."""
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Returns the run of a single process, this one, on one device."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder / "recipe.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command, "write_run_report", lambda *_: [])
        assert main(["train", "--recipe", str(recipe), "--out", str(folder / "run"), "--mesh.data", "1"]) == 0
    return folder / "run"


def digests(folder, step):
    """Returns the digest of every array of a step."""
    records = next(report.arrays for report in inspect_steps(str(folder)) if report.step == step)
    return {name: record.digest for name, record in records.items()}


def assert_same_losses(folder, wanted, kind="train"):
    ours, theirs = losses(folder, kind), losses(wanted, kind)
    assert list(ours) == list(theirs)
    for step, values in ours.items():
        np.testing.assert_allclose(values, theirs[step], rtol=1e-5, err_msg=f"step {step}")


@pytest.mark.slow
def test_two_processes_train_as_one(alone, compiled, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.json"), tmp_path / "run"
    with Processes(tmp_path, TWO, "--recipe", recipe, "--out", run, compiled=compiled) as both:
        assert both.finish() == [0, 0], both.everything()
        assert "Traceback" not in both.everything()
        assert "compiling" in both.said(0)
        assert "compiling" not in both.said(1)
    assert_same_losses(run, alone)
    assert_same_losses(run, alone, "evaluation")
    assert {report.step for report in inspect_steps(str(run)) if not report.damage} == {2, 4, 6}


@pytest.mark.slow
def test_two_processes_draw_the_same_rollouts_as_one(compiled, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", steps=3)
    flags = ("--stage.objective", "looprpt", "--stage.looprpt.rollouts", "2", "--stage.looprpt.hard_share", "0.5")
    runs = [tmp_path / "one", tmp_path / "two"]
    for count, run in enumerate(runs, start=1):
        arguments = ("--recipe", recipe, "--out", run, *flags)
        with Processes(tmp_path / f"of-{count}", [[]] * count, *arguments, compiled=compiled) as some:
            assert some.finish() == [0] * count, some.everything()
    assert_same_losses(*runs)


@pytest.mark.slow
def test_two_processes_answer_as_one(compiled, tmp_path):
    """Each answers a half of the problems. Two others then resume from their checkpoint."""
    recipe = write_recipe(tmp_path / "recipe.json", steps=4)
    flags = (
        "--stage.objective", "policy_gradient", "--stage.batch_size", "8", "--stage.accumulation", "2",
        "--stage.policy.answers", "4", "--stage.policy.max_new_tokens", "3", "--stage.policy.loop_cost", "0.5",
        "--stage.policy.kl_weight", "0.1", "--mesh.data", "1", "--mesh.fsdp", "-1",
    )  # fmt: skip
    runs = [tmp_path / "one", tmp_path / "two"]
    for count, run in enumerate(runs, start=1):
        arguments = ("--recipe", recipe, "--out", run, *flags)
        with Processes(tmp_path / f"of-{count}", [[]] * count, *arguments, compiled=compiled) as some:
            assert some.finish() == [0] * count, some.everything()
            assert "Traceback" not in some.everything()
    one, two = ([row for row in read_metrics(run) if row["kind"] == "train"] for run in runs)
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3, 4]
    for ours, theirs in zip(one, two, strict=True):
        for name in ("reward", "mean_exit_loop", "tokens", "policy_loss", "gradient_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert one[-1]["gradient_norm"] > 0
    answers = [(run / "rollouts.jsonl").read_bytes() for run in runs]
    assert answers[0] == answers[1]

    untouched = digests(runs[1], 4)
    shutil.rmtree(runs[1] / "checkpoints" / "4")
    with Processes(tmp_path / "again", TWO, *arguments, compiled=compiled) as both:
        assert both.finish() == [0, 0], both.everything()
        assert "resuming from step 2" in both.said(0)
    assert digests(runs[1], 4) == untouched
    assert (runs[1] / "rollouts.jsonl").read_bytes() == answers[1]


@pytest.mark.slow
def test_two_processes_train_as_one_in_a_bucket(alone, compiled, bucket, tmp_path):  # noqa: F811
    """Two other processes then resume from their checkpoint."""
    recipe, run = write_recipe(tmp_path / "recipe.json"), any_path(f"{bucket}/run")
    arguments = ("--recipe", recipe, "--out", str(run))
    with Processes(tmp_path, TWO, *arguments, compiled=compiled) as both:
        assert both.finish() == [0, 0], both.everything()
        assert "Traceback" not in both.everything()
    assert_same_losses(run, alone)
    untouched = digests(run, 6)
    (run / "checkpoints" / "6").rmtree()
    with Processes(tmp_path / "again", TWO, *arguments, compiled=compiled) as both:
        assert both.finish() == [0, 0], both.everything()
        assert "resuming from step 4" in both.said(0)
    assert digests(run, 6) == untouched
    assert_same_losses(run, alone)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_on_another_number_of_processes(alone, compiled, tmp_path):
    """Two processes, then two again, then one, then four: each repeats the steps after step 4."""
    recipe, run = write_recipe(tmp_path / "recipe.json"), tmp_path / "run"
    arguments = ("--recipe", recipe, "--out", run)
    with Processes(tmp_path, TWO, *arguments, compiled=compiled) as both:
        assert both.finish() == [0, 0], both.everything()
    untouched = digests(run, 6)
    shutil.rmtree(run / "checkpoints" / "6")
    with Processes(tmp_path, TWO, *arguments, compiled=compiled) as both:
        assert both.finish() == [0, 0], both.everything()
        assert "resuming from step 4" in both.said(0)
    assert digests(run, 6) == untouched
    for count, mesh in ((1, ()), (4, ("--mesh.fsdp", "2"))):
        shutil.rmtree(run / "checkpoints" / "6")
        with Processes(tmp_path, [[]] * count, *arguments, *mesh, compiled=compiled) as some:
            assert some.finish() == [0] * count, some.everything()
        assert_same_losses(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_a_killed_process_of_four_ends_the_others(victim, compiled, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.json", steps=100_000), tmp_path / "run"
    with Processes(tmp_path, [[]] * 4, "--recipe", recipe, "--out", run, compiled=compiled) as four:
        four.wait_for_step(run, 3)
        four.send(victim, signal.SIGKILL)
        statuses = four.finish()
        assert [status for index, status in enumerate(statuses) if index != victim] == [75] * 3, four.everything()


@pytest.mark.slow  # test_process_group has the short form
def test_another_configuration_is_refused_by_all(compiled, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.json"), tmp_path / "run"
    own = ([], ["--stages.pretrain.beta", "0.5"])
    with Processes(tmp_path, own, "--recipe", recipe, "--out", run, compiled=compiled) as both:
        assert both.finish() == [2, 2], both.everything()
        for line in both.last_lines():
            assert "process 1 was started with another configuration than process 0" in line
            assert "stages.pretrain.beta: 0.05, there 0.5" in line
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(victim, compiled, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.json", steps=100_000), tmp_path / "run"
    with Processes(tmp_path, TWO, "--recipe", recipe, "--out", run, compiled=compiled) as both:
        both.wait_for_step(run, 5)
        started = time.monotonic()
        both.send(victim, signal.SIGKILL)
        statuses = both.finish()
        assert time.monotonic() - started < 20
        assert statuses[1 - victim] == 75, both.everything()
        last = both.last_lines()[1 - victim]
        assert last.startswith(f"looplm: process {1 - victim}: ")
        assert f"process {victim}" in last


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step(compiled, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.json", steps=100_000), tmp_path / "run"
    with Processes(tmp_path, TWO, "--recipe", recipe, "--out", run, compiled=compiled) as both:
        both.wait_for_step(run, 5)
        both.send(1, signal.SIGTERM)
        assert both.finish() == [143, 143], both.everything()
        stopped = max(report.step for report in inspect_steps(str(run)) if not report.damage)
        line = f"looplm: stopped by SIGTERM at step {stopped}; the same command resumes there"
        assert both.last_lines()[0] == line
        assert "Traceback" not in both.everything()
    assert max(losses(run)) == stopped


def assert_stopped_at(step, both, run):
    assert both.finish() == [143, 143], both.everything()
    assert max(report.step for report in inspect_steps(str(run)) if not report.damage) == step
    line = f"looplm: stopped by SIGTERM at step {step}; the same command resumes there"
    assert both.last_lines()[0] == line
    assert "Traceback" not in both.everything()


@pytest.mark.slow
def test_a_signal_during_the_compilation_stops_both(tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.json", steps=100_000), tmp_path / "run"
    with Processes(tmp_path, TWO, "--recipe", recipe, "--out", run, compiled=tmp_path / "nothing yet") as both:
        both.wait_until(lambda: "compiling" in both.said(0))
        both.send(1, signal.SIGTERM)
        assert_stopped_at(0, both, run)


@pytest.mark.slow
def test_a_signal_during_an_evaluation_stops_both(compiled, tmp_path):
    """Evaluates after every step, on so many sequences that evaluation takes most of the time."""
    recipe, run = write_recipe(tmp_path / "recipe.json", steps=100_000), tmp_path / "run"
    often = ("--evaluation.every", "1", "--evaluation.sequences", "100000")
    with Processes(tmp_path, TWO, "--recipe", recipe, "--out", run, *often, compiled=compiled) as both:
        both.wait_for_step(run, 1)
        both.send(1, signal.SIGTERM)
        assert_stopped_at(1, both, run)
    assert not losses(run, "evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_refuses_one_process_holds_up_none(victim, compiled, tmp_path):
    recipe, run = write_recipe(tmp_path / "recipe.json", steps=100_000), tmp_path / "run"
    rarely = ("--checkpoint.every", "20")
    with Processes(tmp_path, TWO, "--recipe", recipe, "--out", run, *rarely, compiled=compiled) as both:
        both.wait_for_step(run, 21)
        limit = functools.partial(resource.prlimit, both.processes[victim].pid, resource.RLIMIT_FSIZE)
        limit((2000, resource.RLIM_INFINITY))
        both.wait_until(lambda: both.said(0).count("NOT SAVED: File too large while saving") >= 2)
        limit((resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        refused = both.said(0).count("NOT SAVED")
        here = steps_logged(run)
        both.wait_for_step(run, here + 41)
        both.send(0, signal.SIGTERM)
        assert both.finish() == [143, 143], both.everything()
        assert both.said(0).count("NOT SAVED") <= refused + 1
    assert max(report.step for report in inspect_steps(str(run)) if not report.damage) >= here + 41
