"""From an existing TPU to a run on every host. The host scripts really run."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_cloud import ARGUMENTS, FLAGS, TPU

SHORT_AND_MANY = {"LOOPLM_SHORT_SECONDS": "100"}


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def prepared(cloud):
    cloud.holds("ACTIVE")
    assert cloud.run("prepare", *FLAGS).status == 0


def launched(cloud, **extra):
    prepared(cloud)
    assert cloud.run("launch", *FLAGS, *ARGUMENTS, **extra).status == 0


def ended(cloud):
    return all((home / "looplm/run/outcome").exists() for home in cloud.hosts())


def test_prepare_waits_for_the_tpu(cloud):
    cloud.holds("WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = cloud.run("prepare", *FLAGS)
    assert done.status == 0
    assert done.err.count("ouro is WAITING_FOR_RESOURCES; looking again every 0 s") == 1
    assert "ouro is PROVISIONING" in done.err
    assert len(cloud.calls("describe")) == 4


def test_prepare_goes_on_waiting_when_google_does_not_answer_once(cloud):
    cloud.holds("WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "ACTIVE")
    cloud.fails("queued-resources describe", "ERROR: UNAVAILABLE: try later", after=1)
    done = cloud.run("prepare", *FLAGS)
    assert done.status == 0
    assert "gcloud could not look at ouro: UNAVAILABLE: try later; looking again" in done.err


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (["PROVISIONING", "FAILED"], "ouro is FAILED (no capacity for you): `tpu restart` creates it again"),
        (["SUSPENDED"], "ouro is SUSPENDED: `tpu restart` creates it again, `tpu delete` removes it"),
    ],
)
def test_prepare_does_not_wait_for_what_never_comes(cloud, states, message):
    cloud.holds(*states)
    done = cloud.run("prepare", *FLAGS)
    assert done.status == 2
    assert message in done.err
    assert not cloud.calls("scp")


def test_prepare_without_a_tpu(cloud):
    done = cloud.run("prepare", *FLAGS)
    assert (done.status, done.err) == (2, "tpu: there is no ouro in us-east5-b: tpu create\n")


def test_prepare_installs_the_source_on_every_worker_of_every_slice(cloud):
    cloud.holds("ACTIVE")
    done = cloud.run("prepare", *FLAGS, "--slices", "2")
    assert done.status == 0
    assert [home.name for home in cloud.hosts()] == ["ouro-0-0", "ouro-0-1", "ouro-1-0", "ouro-1-1"]
    for home in cloud.hosts():
        assert (home / "looplm/source/looplm_jax/config.py").exists()
        assert not list(home.glob("looplm/source/**/__pycache__"))
        assert "jax[tpu]" in (home / "installs").read_text()
    assert not list(cloud.folder.glob("looplm-*"))


def test_the_archive_is_made_where_nobody_can_exchange_it(cloud):
    """Two archives of the same source have unpredictable names, each in its own folder."""
    archives = []
    for _ in range(2):
        cloud.holds("ACTIVE")
        cloud.forget_calls()
        assert cloud.run("prepare", *FLAGS).status == 0
        (call,) = cloud.calls("scp")
        archives += [word for word in call if word.endswith(".tgz") and word.startswith("/")]
    first, second = map(Path, archives)
    assert first.parent != second.parent
    assert first.parent.parent == second.parent.parent == cloud.folder
    assert not first.parent.exists()


def test_an_archive_that_cannot_be_made_is_not_sent(cloud):
    cloud.holds("ACTIVE")
    (cloud.bin / "tar").unlink()
    (cloud.bin / "tar").write_text("#!/usr/bin/env bash\nexit 2\n")
    (cloud.bin / "tar").chmod(0o755)
    assert cloud.run("prepare", *FLAGS).status == 1
    assert not cloud.calls("scp")


def test_no_temporary_folder_is_one_line(cloud):
    missing = str(cloud.folder / "missing")
    done = cloud.run("prepare", *FLAGS, TMPDIR=missing)
    assert done.status == 2
    assert done.err == (
        f"tpu: no temporary folder can be made in {missing}; set TMPDIR to a folder that you can write to\n"
    )


def test_what_google_says_cannot_steer_the_terminal(cloud):
    cloud.fails("queued-resources describe", "ERROR: \x1b]0;title\x07 try later")
    done = cloud.run("prepare", *FLAGS)
    assert done.err == "tpu: gcloud could not look at ouro: ?]0;title? try later\n"


def test_prepare_twice_installs_once_and_says_so(cloud):
    prepared(cloud)
    installs = [(home / "installs").read_text() for home in cloud.hosts()]
    done = cloud.run("prepare", *FLAGS)
    assert done.status == 0
    assert done.out.splitlines() == ["ouro-0: prepared already", "ouro-1: prepared already"]
    assert [(home / "installs").read_text() for home in cloud.hosts()] == installs


def test_a_worker_that_fails_while_preparing_is_named_and_tried_again(cloud):
    cloud.holds("ACTIVE")
    cloud.fails("tpu-vm ssh ouro-1", "Connection closed", status=255)
    done = cloud.run("prepare", *FLAGS, "--slices", "2")
    assert done.status == 1
    assert "tpu: ouro-1: a worker failed (status 255)" in done.err
    assert "preparing failed on a host, see above; the same command tries again" in done.err
    done = cloud.run("prepare", *FLAGS, "--slices", "2")
    assert done.status == 0
    assert done.out.count("prepared already") == 2


def test_an_installation_that_fails_does_not_count_as_prepared(cloud):
    cloud.holds("ACTIVE")
    (cloud.bin / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")
    assert cloud.run("prepare", *FLAGS).status == 1
    assert not (cloud.hosts()[0] / "looplm/prepared").exists()


def test_launch_runs_looplm_train_on_every_host_with_these_very_words(cloud):
    prepared(cloud)
    words = ["--recipe", "ouro 1.4b", "--data", 'it\'s "$HOME" `x` \\ *.jsonl', "--empty", "", "two\nlines", "ü"]
    done = cloud.run("launch", *FLAGS, "--", *words)
    assert done.status == 0
    for home in cloud.hosts():
        command = (home / "looplm/run/command").read_text().split("\0")[:-1]
        assert command == [
            f"{home}/looplm/venv/bin/looplm",
            "train",
            "--distributed",
            "--out",
            "gs://bucket/run",
            *words,
        ]


def test_launch_twice_starts_one_run_and_says_so(cloud):
    launched(cloud)
    pids = cloud.host_text("run/pid")
    done = cloud.run("launch", *FLAGS, *ARGUMENTS)
    assert done.status == 0
    assert done.out.splitlines() == ["ouro-0: runs already", "ouro-1: runs already"]
    assert cloud.host_text("run/pid") == pids


def test_launch_starts_only_what_does_not_run(cloud):
    launched(cloud)
    os.killpg(int(cloud.host_text("run/pid")[1]), signal.SIGKILL)
    done = cloud.run("launch", *FLAGS, *ARGUMENTS)
    assert done.out.splitlines() == ["ouro-0: runs already", "ouro-1: started"]


def test_another_run_is_not_started_beside_one(cloud):
    launched(cloud)
    done = cloud.run("launch", *FLAGS, "--", "--recipe", "other")
    assert done.status == 1
    assert "ouro-0: another run is alive: tpu stop" in done.err
    assert all("ouro-1.4b" in command for command in cloud.host_text("run/command"))


def test_another_source_is_not_put_under_a_run(cloud):
    launched(cloud)
    for home in cloud.hosts():
        (home / "looplm/prepared").write_text("older\n")
    done = cloud.run("prepare", *FLAGS)
    assert done.status == 1
    assert "another source is in use by a run: tpu stop" in done.err


def test_launch_on_a_host_that_is_not_prepared(cloud):
    prepared(cloud)
    (cloud.hosts()[1] / "looplm/prepared").unlink()
    done = cloud.run("launch", *FLAGS, *ARGUMENTS)
    assert done.status == 1
    assert "ouro-1: not prepared: tpu prepare" in done.err


def test_the_environment_of_the_run(cloud, tmp_path):
    (tmp_path / "host.env").write_text("# a comment\nKEY=it's $HOME `date`\nLIBTPU_INIT_ARGS=--a=1 --b=2\n")
    prepared(cloud)
    assert {home.joinpath("looplm").stat().st_mode & 0o777 for home in cloud.hosts()} == {0o700}
    cloud.run("launch", *FLAGS, "--host-env", str(tmp_path / "host.env"), *ARGUMENTS, FAKE_LOOPLM="env; exit 0")
    until(lambda: ended(cloud))
    for log in cloud.host_text("run/log"):
        assert "KEY=it's $HOME `date`" in log
        assert "LIBTPU_INIT_ARGS=--a=1 --b=2" in log
    assert "KEY" not in str(cloud.calls("ssh"))
    cloud.run("launch", *FLAGS, *ARGUMENTS, FAKE_LOOPLM="exit 0")
    assert not (cloud.hosts()[0] / "looplm/host.env").exists()


def test_stop_lets_every_host_save_and_says_what_goes_on_costing(cloud):
    launched(cloud)
    done = cloud.run("stop", *FLAGS)
    assert done.status == 0
    assert done.out.splitlines() == ["ouro-0: stopped", "ouro-1: stopped"]
    assert done.err == "tpu: nothing is running; the TPU still costs money: tpu delete\n"
    assert all("saved" in log for log in cloud.host_text("run/log"))
    assert all(log.count("attempt 1:") == 1 and "attempt 2" not in log for log in cloud.host_text("run/log"))


def test_stop_twice_does_no_harm_and_says_so(cloud):
    launched(cloud)
    cloud.run("stop", *FLAGS)
    done = cloud.run("stop", *FLAGS)
    assert done.status == 0
    assert done.out.splitlines() == ["ouro-0: nothing runs", "ouro-1: nothing runs"]


def test_stop_does_not_wait_for_ever(cloud):
    launched(cloud, FAKE_LOOPLM="trap '' TERM; while :; do sleep 0.05; done")
    done = cloud.run("stop", *FLAGS, "--grace", "0")
    assert done.status == 1
    assert "ouro-0: still saving after 0 s: tpu stop again, with a longer --grace" in done.err


def test_a_run_that_breaks_is_started_again(cloud):
    launched(cloud, FAKE_LOOPLM='[[ -e $HOME/seen ]] && exit 0; touch "$HOME/seen"; exit 1')
    until(lambda: ended(cloud))
    assert cloud.host_text("run/outcome") == ["finished\n", "finished\n"]
    assert all("attempt 1 ended with status 1" in log for log in cloud.host_text("run/log"))


@pytest.mark.parametrize("end", ["exit 143", "exit 75", "kill -ABRT $$"])
def test_a_run_that_a_signal_or_a_lost_process_ends_is_started_again(cloud, end):
    launched(cloud, FAKE_LOOPLM=f'[[ -e $HOME/seen ]] && exit 0; touch "$HOME/seen"; {end}')
    until(lambda: ended(cloud))
    assert cloud.host_text("run/outcome") == ["finished\n", "finished\n"]


def test_a_mistake_is_not_tried_again(cloud):
    launched(cloud, FAKE_LOOPLM="exit 2")
    until(lambda: ended(cloud))
    assert cloud.host_text("run/outcome") == ["failed status 2\n"] * 2
    assert all("attempt 2" not in log for log in cloud.host_text("run/log"))


def test_a_run_that_breaks_at_once_each_time_is_given_up(cloud):
    launched(cloud, FAKE_LOOPLM="exit 1", **SHORT_AND_MANY)
    until(lambda: ended(cloud))
    assert cloud.host_text("run/outcome") == ["failed status 1, 5 short attempts in a row\n"] * 2


def test_a_machine_that_goes_down_leaves_no_outcome(cloud):
    launched(cloud)
    for pid in cloud.host_text("run/pid"):
        os.kill(int(pid), signal.SIGTERM)
    until(lambda: all("the machine goes down" in log for log in cloud.host_text("run/log")))
    assert all("saved" in log for log in cloud.host_text("run/log"))
    done = cloud.run("status", *FLAGS)
    assert done.out.splitlines() == ["dead ouro-0", "dead ouro-1"]


def test_status_tells_of_the_tpu_and_of_every_host(cloud):
    cloud.holds("ACTIVE")
    assert cloud.run("status", *FLAGS).out.splitlines() == ["unprepared ouro-0", "unprepared ouro-1"]
    cloud.run("prepare", *FLAGS)
    assert cloud.run("status", *FLAGS).out.splitlines() == ["absent ouro-0", "absent ouro-1"]
    cloud.run("launch", *FLAGS, *ARGUMENTS)
    assert [line.split()[:2] for line in cloud.run("status", *FLAGS).out.splitlines()] == [
        ["running", "ouro-0"],
        ["running", "ouro-1"],
    ]
    cloud.run("stop", *FLAGS)
    assert cloud.run("status", *FLAGS).out.splitlines() == ["stopped ouro-0 stopped", "stopped ouro-1 stopped"]
    cloud.holds("SUSPENDED")
    assert cloud.run("status", *FLAGS).err == "tpu: ouro is SUSPENDED\n"


def test_follow_shows_the_log_of_one_host_until_the_run_ends(cloud):
    launched(cloud, FAKE_LOOPLM="sleep 1; echo step 1; exit 0")
    done = cloud.run("follow", *FLAGS, "--worker", "1")
    assert done.status == 0
    assert "step 1" in done.out
    assert "supervisor" in done.out
    assert "--worker=1" in cloud.calls("follow.sh")[0]
    assert "ouro-1: nothing is running" in cloud.run("follow", *FLAGS, "--worker", "1").out


def test_follow_before_a_launch(cloud):
    prepared(cloud)
    assert cloud.run("follow", *FLAGS).out == "ouro-0: nothing was launched here yet\n"


def test_a_connection_that_breaks_leaves_the_run_alone(cloud):
    launched(cloud)
    cloud.fails("follow.sh", "Connection closed", status=255)
    done = cloud.run("follow", *FLAGS)
    assert done.status == 1
    assert done.err.endswith("tpu: the connection ended (status 255); the run continues: tpu status\n")


def test_ctrl_c_while_following_leaves_the_run_alone_and_says_so(cloud):
    launched(cloud)
    following = subprocess.Popen(
        [TPU, "follow", *FLAGS],
        env=cloud.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert b"attempt 1" in following.stdout.readline()
    os.killpg(following.pid, signal.SIGINT)
    _, err = following.communicate(timeout=20)
    assert following.returncode == 130
    assert b"tpu: the run continues; tpu stop ends it" in err
    assert [line.split()[0] for line in cloud.run("status", *FLAGS).out.splitlines()] == ["running", "running"]
