"""A preempted TPU: `restart` starts the run once more, `watch` after every preemption."""

import shutil

import pytest
from fake_cloud import ARGUMENTS, FLAGS

FINISHES = "sleep 0.3; exit 0"


def running(cloud):
    return [line.split()[0] for line in cloud.run("status", *FLAGS).out.splitlines()]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_restart_creates_again_what_was_taken_away_and_launches(cloud, state):
    cloud.holds(state)
    done = cloud.run("restart", *FLAGS, "--yes", *ARGUMENTS)
    assert done.status == 0
    verbs = [words[4] for words in cloud.calls("queued-resources")]
    assert verbs == ["describe", "delete", "create", "describe"]
    assert running(cloud) == ["running", "running"]


def test_restart_asks_before_it_deletes(cloud):
    cloud.holds("SUSPENDED")
    done = cloud.run("restart", *FLAGS, *ARGUMENTS)
    assert done.status == 2
    assert "ouro is SUSPENDED: this deletes what is left of it and creates it again." in done.err
    assert not cloud.calls(" delete ")


def test_restart_of_what_runs_changes_nothing(cloud):
    cloud.run("restart", *FLAGS, *ARGUMENTS)
    pids = cloud.host_text("run/pid")
    cloud.forget_calls()
    done = cloud.run("restart", *FLAGS, *ARGUMENTS)
    assert done.status == 0
    assert cloud.host_text("run/pid") == pids
    assert not cloud.calls(" create ")
    assert not cloud.calls(" delete ")


def test_restart_goes_on_after_a_stop(cloud):
    cloud.run("restart", *FLAGS, *ARGUMENTS)
    cloud.run("stop", *FLAGS)
    assert cloud.run("restart", *FLAGS, *ARGUMENTS).status == 0
    assert running(cloud) == ["running", "running"]


def test_watch_asks_once_at_its_start(cloud):
    done = cloud.run("watch", *FLAGS, *ARGUMENTS)
    assert done.status == 2
    assert "Whenever ouro is preempted, this deletes what is left and recreates it." in done.err
    assert not cloud.calls()


def test_watch_brings_a_run_from_nothing_to_its_end(cloud):
    cloud.change(next_states=["WAITING_FOR_RESOURCES", "ACTIVE"])
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS, FAKE_LOOPLM=FINISHES)
    assert done.status == 0
    assert "ouro is WAITING_FOR_RESOURCES" in done.err
    assert done.err.endswith("tpu: the run has finished; the TPU still costs money: tpu delete\n")


def test_watch_deletes_the_tpu_of_a_finished_run_if_asked_to(cloud):
    words = ("watch", *FLAGS, "--delete-when-finished")
    assert "It deletes it once the run has finished, too." in cloud.run(*words, *ARGUMENTS).err
    done = cloud.run(*words, "--yes", *ARGUMENTS, FAKE_LOOPLM=FINISHES)
    assert done.status == 0
    assert done.err.endswith("tpu: the run has finished; ouro is deleted and costs nothing more\n")
    assert cloud.state()["queued"] == {}


def test_watch_recreates_prepares_and_launches_after_a_preemption(cloud):
    cloud.holds("ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED")
    finishes_when_recreated = 'until grep -q \'"create"\' "$FAKE_CLOUD/calls.jsonl"; do sleep 0.1; done; exit 0'
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS, FAKE_LOOPLM=finishes_when_recreated)
    assert done.status == 0
    assert "ouro is SUSPENDING\n" in done.err
    assert "ouro is SUSPENDED; deleting what is left, creating it again" in done.err
    assert len(cloud.calls("queued-resources create")) == 1
    assert done.err.endswith("the run has finished; the TPU still costs money: tpu delete\n")


def test_watch_starts_the_run_again_on_a_host_that_was_rebooted(cloud):
    cloud.run("restart", *FLAGS, *ARGUMENTS)
    cloud.end_processes()
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS, FAKE_LOOPLM=FINISHES)
    assert done.status == 0
    assert "ouro-0: started" in done.out


def test_watch_prepares_a_host_that_was_replaced(cloud):
    cloud.run("restart", *FLAGS, *ARGUMENTS, FAKE_LOOPLM=FINISHES)
    shutil.rmtree(cloud.hosts()[1] / "looplm")
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS, FAKE_LOOPLM=FINISHES)
    assert done.status == 0
    assert "ouro-1: prepared\n" in done.out


def test_watch_leaves_alone_what_was_stopped_on_purpose(cloud):
    cloud.run("restart", *FLAGS, *ARGUMENTS)
    cloud.run("stop", *FLAGS)
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS)
    assert done.status == 0
    assert done.err == "tpu: the run was stopped; the TPU still costs money: tpu delete\n"


def test_watch_does_not_restart_a_mistake(cloud):
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS, FAKE_LOOPLM="exit 2")
    assert done.status == 1
    assert "failed ouro-0 failed status 2; tpu follow says why, and the TPU still costs money" in done.err


def test_watch_gives_up_where_there_is_no_capacity(cloud):
    cloud.change(next_states=["FAILED"])
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS)
    assert done.status == 2
    message = "ouro was created 3 times and never ran (no capacity for you); is there capacity in us-east5-b?"
    assert message in done.err
    assert len(cloud.calls(" delete ")) == 3


def test_watch_bears_with_passing_faults_of_a_host(cloud):
    cloud.fails("tpu-vm ssh", "Connection closed", status=255, times=2)
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS, FAKE_LOOPLM=FINISHES)
    assert done.status == 0
    assert "that did not go well (2 of 5 in a row)" in done.err


@pytest.mark.parametrize(
    "verb", ["delete", *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("describe", "create"))]
)
def test_watch_bears_with_passing_faults_of_google(cloud, verb):
    cloud.holds("SUSPENDED")
    cloud.fails(f"queued-resources {verb}", "ERROR: UNAVAILABLE: try later", times=2)
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS, FAKE_LOOPLM=FINISHES)
    assert done.status == 0
    assert "UNAVAILABLE: try later" in done.err
    assert done.err.endswith("the run has finished; the TPU still costs money: tpu delete\n")


def test_watch_does_not_bear_with_lasting_ones(cloud):
    cloud.fails("tpu-vm ssh", "Connection closed", status=255, times=99)
    done = cloud.run("watch", *FLAGS, "--yes", *ARGUMENTS)
    assert done.status == 1
    assert done.err.endswith("giving up; what is left of ouro still costs money: tpu status, tpu delete\n")
    assert len(cloud.calls("tpu-vm ssh")) == 5
