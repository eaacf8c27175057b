"""Runs whose folder is in a bucket equal runs on a disk, even if the bucket refuses requests meanwhile."""

import dataclasses
import io
import itertools
import json
import signal
import time
from pathlib import Path

import pytest
from etils import epath
from gcs_emulator import a_checkpoint_was_refused, bucket, gcs, make_read_only  # noqa: F401
from rich.console import Console
from run_processes import PATIENCE, Run, metrics, newest, steps_logged, write_recipe
from training_cases import RECIPE, STAGE, assert_identical, one_stage

from looplm_jax.checkpoints import inspect_steps
from looplm_jax.checkpoints._step import list_steps
from looplm_jax.cli.main import main
from looplm_jax.config import CheckpointConfig
from looplm_jax.errors import UserError
from looplm_jax.files import any_path
from looplm_jax.training import _ownership as ownership
from looplm_jax.training import run
from looplm_jax.training._profiling import ProfiledSteps

UNWATCHED = {"data": dataclasses.replace(RECIPE.data, validation_fraction=0.0)}  # no evaluations
SHORT = one_stage(dataclasses.replace(STAGE, steps=8, min_loops=0), checkpoint=CheckpointConfig(every=2), **UNWATCHED)
LONG = one_stage(
    dataclasses.replace(STAGE, steps=60, min_loops=0), checkpoint=CheckpointConfig(every=5, keep=2), **UNWATCHED
)


def train(folder, recipe=SHORT, **options):
    """Returns the outcome, and the lines that were printed."""
    said = io.StringIO()
    outcome = run.train(recipe, folder, console=Console(file=said, soft_wrap=True), **options)
    return outcome, said.getvalue()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    train(folder)
    return folder


def assert_same_end(folder, untouched):
    ours, wanted = newest(folder), newest(untouched)
    assert (ours["step"], ours["data"]) == (wanted["step"], wanted["data"])
    assert_identical(ours["state"], wanted["state"])
    assert metrics(folder) == metrics(untouched)


def files(folder: epath.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def refusing(gcs, bucket, monkeypatch):  # noqa: F811
    """Makes the bucket read-only at step 4, once step 2 is saved. Yields a setter for the step that ends it."""
    to_device, count = run.to_device, itertools.count(1)
    ends = []

    def placing(*arguments):
        step = next(count)
        if step == 4:
            checkpoints = epath.Path(f"{bucket}/run/checkpoints")
            wait_until(lambda: any(step.committed for step in list_steps(checkpoints)))
            make_read_only(gcs, bucket)
        if step in ends:
            wait_until(lambda: a_checkpoint_was_refused(gcs, bucket))
            make_read_only(gcs, bucket, read_only=False)
        return to_device(*arguments)

    monkeypatch.setattr(run, "to_device", placing)
    yield ends.append
    make_read_only(gcs, bucket, read_only=False)


def wait_until(ready):
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_on_a_disk_that_nobody_touched(bucket, compiled_programs, tmp_path, capsys):  # noqa: F811
    recipe, folder = write_recipe(tmp_path / "long.json", LONG), any_path(f"{bucket}/some/run")
    with Run("--recipe", recipe, "--out", folder, errors=tmp_path / "errors", compiled=compiled_programs) as killed:
        killed.wait_until(
            lambda: time.sleep(0.2) or steps_logged(folder) > 12
        )  # polling all the time would slow down the bucket
        killed.process.kill()
        assert killed.finish() == -signal.SIGKILL
    assert main(["train", "--recipe", str(recipe), "--out", str(folder)]) == 0
    assert "resuming from step" in capsys.readouterr().err
    assert main(["train", "--recipe", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert_same_end(folder, tmp_path / "run")
    assert files(folder) >= {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "report.md"}
    assert all(name.startswith("events.out.tfevents.") for name in files(folder / "tensorboard"))
    assert not Path("gs:").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")  # of the client, for a profile
def test_checkpoints_and_profiles_in_a_bucket_are_read(bucket, tmp_path, capsys):  # noqa: F811
    folder = f"{bucket}/run"
    _, said = train(folder, profile=ProfiledSteps.parse("2:3"))
    assert f"xprof --logdir {folder}/profile" in said
    assert [file for _, _, names in epath.Path(f"{folder}/profile").walk() for file in names if "xplane" in file]
    assert main(["inspect", folder]) == 0
    assert main(["convert", "upcycle", folder, str(tmp_path / "deep"), "--layers", "2"]) == 0
    assert f"looplm evaluate {folder}" in capsys.readouterr().out
    start = dataclasses.replace(SHORT.start, checkpoint=folder)
    _, said = train(f"{bucket}/other", dataclasses.replace(SHORT, start=start))
    assert f"starting from the parameters of {folder}, step 8" in said


@pytest.mark.slow
def test_checkpoints_in_a_bucket_are_evaluated_and_generate(bucket, tmp_path, capsys):  # noqa: F811
    folder = f"{bucket}/run"
    train(folder)
    evaluated = ["--data", RECIPE.data.sources[0].path, "--validation-fraction", "0.1", "--sequences", "4"]
    assert main(["evaluate", folder, "--out", str(tmp_path / "evaluation"), *evaluated]) == 0
    assert main(["generate", folder, "--prompt", "1", "--max-new-tokens", "2"]) == 0
    assert f"looplm generate {folder}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_bucket_that_is_read_only_for_a_while_costs_nothing(bucket, local, refusing):  # noqa: F811
    refusing(6)
    outcome, said = train(f"{bucket}/run")
    lines = said.splitlines()
    assert sum("NOT SAVED: " in line and line.endswith("; training continues") for line in lines) == 1
    assert f"NOT WRITTEN: {bucket}/run/metrics.jsonl (Forbidden: " in said
    assert f"{bucket}/run/metrics.jsonl is written again; nothing is missing" in lines
    assert outcome.step == SHORT.total_steps
    assert_same_end(any_path(f"{bucket}/run"), local)


@pytest.mark.slow
@pytest.mark.usefixtures("refusing")
def test_a_bucket_that_stays_read_only_ends_a_run_with_one_line(gcs, bucket, local):  # noqa: F811
    with pytest.raises(UserError, match=rf"Forbidden.* while saving step 8 to {bucket}/run/checkpoints: fix that and "
                       r"resume; step 2 is the latest valid one"):  # fmt: skip
        train(f"{bucket}/run")
    make_read_only(gcs, bucket, read_only=False)
    assert [report.step for report in inspect_steps(f"{bucket}/run") if not report.damage] == [2]
    _, said = train(f"{bucket}/run")
    assert "resuming from step 2" in said
    assert_same_end(any_path(f"{bucket}/run"), local)


def test_a_bucket_that_is_read_only_at_the_start_is_refused(gcs, bucket):  # noqa: F811
    make_read_only(gcs, bucket)
    with pytest.raises(UserError, match=r"/run cannot be written \(Forbidden: .*; fix that and run the same command"):
        train(f"{bucket}/run")
    with pytest.raises(UserError, match=r"gs://nobody-has-this/run cannot be written \(there is no such"):
        train("gs://nobody-has-this/run")


def check_for(seconds, owned):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        owned.check()
        time.sleep(0.01)


def test_a_bucket_has_one_owner(bucket, monkeypatch):  # noqa: F811
    folder = any_path(f"{bucket}/owned")
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.05)
    other = dataclasses.replace(ownership.Owner.this_process(), boot="other", host="elsewhere")
    owner_file = folder / ownership.OWNER_FILE
    with ownership.own(folder) as owned:
        owner_file.write_text(json.dumps(dataclasses.asdict(other)))
        with pytest.raises(UserError, match="was moved, removed or taken over by another process"):
            check_for(30, owned)
    assert "elsewhere" in owner_file.read_text()
    refused = pytest.raises(UserError, match=r"owned is in use by process \d+ on elsewhere, alive \d+ s ago;")
    with refused, ownership.own(folder):
        pass
    monkeypatch.setattr(ownership, "STALE_SECONDS", 0.0)
    with ownership.own(folder) as owned:
        owned.check()
    assert not owner_file.exists()


@pytest.mark.slow
def test_another_run_in_a_bucket_is_refused(bucket):  # noqa: F811
    epath.Path(f"{bucket}/notes/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run; choose another --out"):
        train(f"{bucket}/notes")
    with pytest.raises(
        UserError, match=r"s3://bucket/run: a run is stored on a disk or in a bucket; give a path, or gs://"
    ):
        train("s3://bucket/run")
    train(f"{bucket}/run")
    with pytest.raises(UserError, match="was trained with another configuration"):
        train(f"{bucket}/run", dataclasses.replace(SHORT, seed=1))
