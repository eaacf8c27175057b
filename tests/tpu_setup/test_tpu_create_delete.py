"""Creating and deleting a TPU: requests, refusals, and TPUs that exist already."""

import os
import pty
import subprocess

import pytest
from fake_cloud import FLAGS, TPU, FakeCloud

QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProject' exceeded"
)


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_create_asks_for_what_was_said(cloud):
    done = cloud.run("create", *FLAGS, "--service-account", "me@p.iam", "--create-flag=--internal-ips", "--project=p")
    assert done.status == 0
    (call,) = cloud.calls(" create ")
    assert call[1:6] == ["compute", "tpus", "queued-resources", "create", "ouro"]
    assert call[6:] == [
        "--zone=us-east5-b",
        "--project=p",
        "--accelerator-type=v6e-16",
        "--runtime-version=v2-alpha-tpuv6e",
        "--node-id=ouro",
        "--spot",
        "--service-account=me@p.iam",
        "--internal-ips",
    ]


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v5p-512", "v2-alpha-tpuv5"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_runtime_follows_from_the_accelerator(cloud, accelerator, runtime):
    done = cloud.run("create", *FLAGS, "--accelerator", accelerator, "--dry-run")
    assert f"--runtime-version={runtime}" in done.out


@pytest.mark.parametrize(
    ("flags", "wanted", "unwanted"),
    [
        (["--spot"], ["--spot"], ["--reserved"]),
        (["--on-demand"], [], ["--spot", "--reserved"]),
        (["--reserved"], ["--reserved"], ["--spot"]),
        (["--reservation", "mine"], ["alpha", "--reservation=mine"], ["--spot", "--reserved"]),
        (["--slices", "3"], ["--node-count=3", "--node-prefix=ouro"], ["--node-id=ouro"]),
    ],
)
def test_capacity_and_slices(cloud, flags, wanted, unwanted):
    cloud.run("create", *FLAGS, *flags)
    (call,) = cloud.calls(" create ")
    assert set(wanted) <= set(call)
    assert not set(unwanted) & set(call)


def test_create_twice_does_no_harm_and_says_so(cloud):
    cloud.run("create", *FLAGS)
    cloud.forget_calls()
    done = cloud.run("create", *FLAGS)
    assert done.status == 0
    assert last_line(done.err) == "tpu: ouro exists already and is ACTIVE; nothing was done"
    assert not cloud.calls(" create ")


def test_create_does_not_take_another_accelerator_for_its_own(cloud):
    cloud.holds("ACTIVE", accelerator="v5p-8")
    done = cloud.run("create", *FLAGS)
    assert done.status == 2
    assert last_line(done.err) == "tpu: ouro exists as v5p-8, not v6e-16: delete it or take another --name"


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_says_what_to_do_with_the_remains(cloud, state):
    cloud.holds(state)
    done = cloud.run("create", *FLAGS)
    assert done.status == 2
    assert f"ouro exists and is {state}: `tpu restart` creates it again, `tpu delete` removes it" in done.err


def test_a_quota_error_is_one_line_that_says_where_to_ask(cloud):
    cloud.fails("queued-resources create", f"Some chatter\n{QUOTA}")
    done = cloud.run("create", *FLAGS)
    assert done.status == 2
    assert last_line(done.err).startswith("tpu: ouro was not created: (gcloud.compute.tpus.queued-resources.create)")
    assert "ask for more quota (console: IAM & Admin > Quotas" in last_line(done.err)
    assert "delete" not in last_line(done.err)


def test_a_create_that_leaves_something_behind_says_what_deletes_it(cloud):
    cloud.fails("queued-resources create", QUOTA, done=True)
    cloud.change(next_states=["FAILED"])
    done = cloud.run("create", *FLAGS)
    assert done.status == 2
    command = "gcloud compute tpus queued-resources delete ouro --zone=us-east5-b --force --quiet"
    assert last_line(done.err).endswith(f"; it left ouro behind as FAILED, which this deletes: {command}")


def test_a_name_that_is_taken_between_two_calls(cloud):
    cloud.fails("queued-resources describe", "ERROR: NOT_FOUND")
    cloud.holds("PROVISIONING")
    done = cloud.run("create", *FLAGS)
    assert done.status == 2
    assert "ouro was not created: (gcloud) ALREADY_EXISTS" in done.err
    assert "it left ouro behind as PROVISIONING" in done.err


@pytest.mark.parametrize(
    ("says", "remedy"),
    [
        ("ERROR: PERMISSION_DENIED: no", "your account needs the role roles/tpu.admin"),
        ("ERROR: PERMISSION_DENIED SERVICE_DISABLED: no", "gcloud services enable tpu.googleapis.com"),
        ("ERROR: You do not have valid credentials", "log in: gcloud auth login"),
        ("", "it did not say why"),
    ],
)
def test_what_gcloud_refuses_names_its_remedy(cloud, says, remedy):
    cloud.fails("describe", says)
    done = cloud.run("create", *FLAGS)
    assert done.status == 2
    assert remedy in last_line(done.err)
    assert not cloud.calls(" create ")


def test_without_gcloud_one_line_says_how_to_install_it(tmp_path):
    done = FakeCloud(tmp_path / "cloud", tools=()).run("create", *FLAGS)
    assert done.status == 2
    assert one_line(done.err) == "tpu: gcloud is not installed: https://cloud.google.com/sdk/docs/install says how"


def test_delete_needs_a_yes_where_nobody_can_be_asked(cloud):
    cloud.holds("ACTIVE")
    done = cloud.run("delete", *FLAGS)
    assert done.status == 2
    assert one_line(done.err).endswith("There is no terminal to ask on: say --yes")
    assert not cloud.calls()


def test_delete_takes_the_nodes_with_it(cloud):
    cloud.holds("ACTIVE")
    done = cloud.run("delete", *FLAGS, "--yes")
    assert done.status == 0
    assert cloud.calls(" delete ")[0][-2:] == ["--force", "--quiet"]
    assert cloud.state()["queued"] == {}


def test_delete_of_what_is_not_there_does_nothing_and_says_so(cloud):
    done = cloud.run("delete", *FLAGS, "--yes")
    assert done.status == 0
    assert one_line(done.err) == "tpu: there is no ouro in us-east5-b; nothing was done"
    assert not cloud.calls(" delete ")


def test_delete_of_what_vanishes_meanwhile_is_well(cloud):
    cloud.holds("ACTIVE")
    cloud.fails(" delete ", "ERROR: NOT_FOUND: gone")
    assert cloud.run("delete", *FLAGS, "--yes").status == 0


def test_a_delete_that_fails_warns_of_the_cost(cloud):
    cloud.holds("ACTIVE")
    cloud.fails(" delete ", "ERROR: INTERNAL: try later")
    done = cloud.run("delete", *FLAGS, "--yes")
    assert done.status == 1
    assert "ouro was not deleted and may still cost money: INTERNAL: try later; try again: gcloud compute" in done.err


@pytest.mark.parametrize(("typed", "status", "left"), [("ouro\n", 0, 0), ("y\n", 2, 1), ("\n", 2, 1)])
def test_delete_asks_for_the_name_on_a_terminal(cloud, typed, status, left):
    cloud.holds("ACTIVE")
    master, terminal = pty.openpty()
    command = subprocess.Popen([TPU, "delete", *FLAGS], stdin=terminal, stderr=subprocess.PIPE, env=cloud.environment())
    os.write(master, typed.encode())
    _, err = command.communicate(timeout=30)
    os.close(master)
    os.close(terminal)
    assert command.returncode == status
    assert b"This deletes the TPU ouro in us-east5-b and whatever runs on it. Type its name" in err
    assert len(cloud.state()["queued"]) == left


def test_flags_for_gcloud_are_passed_on(cloud):
    words = [*FLAGS, "--zone=us-central1-ai1a", "--connect-flag=--internal-ip", "--connect-flag", "--quiet"]
    done = cloud.run("stop", *words, "--dry-run")
    assert "ssh ouro --zone=us-central1-ai1a --worker=all --internal-ip --quiet '--command=" in done.out


def test_list_shows_the_zone(cloud):
    cloud.fails("queued-resources list", "", status=0)
    assert cloud.run("list", "--zone", "us-east5-b").status == 0
    assert cloud.calls()[0] == ["gcloud", "compute", "tpus", "queued-resources", "list", "--zone=us-east5-b"]
