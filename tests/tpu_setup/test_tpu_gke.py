"""Creating, using and deleting TPUs on GKE, through xpk."""

import pytest
from fake_cloud import ARGUMENTS, FLAGS, FakeCloud

GKE = [*FLAGS, "--image", "registry/image:1"]


@pytest.fixture
def cluster(cloud):
    cloud.change(clusters=["ouro"])
    return cloud


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [([], "--spot"), (["--on-demand"], "--on-demand"), (["--reservation", "mine"], "--reservation=mine")],
)
def test_create(cloud, flags, wanted):
    done = cloud.run("gke", "create", *GKE, *flags, "--slices", "2")
    assert done.status == 0
    (call,) = cloud.calls("xpk")
    assert call == [
        *["xpk", "cluster", "create", "--cluster=ouro", "--tpu-type=v6e-16", "--num-slices=2"],
        *[wanted, "--zone=us-east5-b"],
    ]


def test_a_create_that_fails_says_what_deletes_the_remains(cloud):
    cloud.fails("cluster create", "[XPK] Cluster create request returned ERROR 1", done=True)
    done = cloud.run("gke", "create", *GKE)
    assert done.status == 2
    assert "this deletes what there is: xpk cluster delete --cluster=ouro --zone=us-east5-b --force" in done.err


def test_prepare_builds_and_pushes_the_image(cloud):
    assert cloud.run("gke", "prepare", *GKE).status == 0
    build, push = cloud.calls("docker")
    assert build[:4] == ["docker", "build", "--tag", "registry/image:1"]
    assert push == ["docker", "push", "registry/image:1"]


def test_an_image_that_does_not_build_is_not_pushed(cloud):
    cloud.fails("docker build", "no space")
    done = cloud.run("gke", "prepare", *GKE)
    assert done.status == 1
    assert done.err.endswith("tpu: the image was not built, see above\n")
    assert not cloud.calls("docker push")


def test_launch_submits_a_run_that_gets_signals_and_restarts(cluster, tmp_path):
    (tmp_path / "env").write_text("A=1\n")
    done = cluster.run("gke", "launch", *GKE, "--host-env", str(tmp_path / "env"), "--", "--data", "it's *.jsonl")
    assert done.status == 0
    assert cluster.calls("get-credentials ouro --region=us-east5")
    (call,) = cluster.calls("workload create")
    assert "--command=exec looplm train --distributed --out gs://bucket/run --data 'it'\\''s *.jsonl'" in call
    assert {"--restart-on-exit-codes=1-1,3-126", "--max-restarts=1000", "--docker-image=registry/image:1"} <= set(call)
    assert {"--termination-grace-period-seconds=300", f"--env-file={tmp_path}/env"} <= set(call)


def test_launch_twice_submits_once_and_says_so(cluster):
    cluster.run("gke", "launch", *GKE, *ARGUMENTS)
    done = cluster.run("gke", "launch", *GKE, *ARGUMENTS)
    assert (done.status, done.err) == (0, "tpu: ouro is submitted already; nothing was done\n")
    assert len(cluster.calls("workload create")) == 1


def test_a_cluster_that_cannot_be_reached(cloud):
    cloud.fails("get-credentials", "ERROR: (gcloud.container.clusters.get-credentials) NOT_FOUND: no cluster")
    done = cloud.run("gke", "launch", *GKE, *ARGUMENTS)
    assert done.status == 2
    assert "gcloud could not reach the cluster ouro: (gcloud.container.clusters.get-credentials) NOT_FOUND" in done.err


def test_follow_and_status(cluster):
    assert cluster.run("gke", "follow", *GKE, "--node", "1").status == 0
    (call,) = cluster.calls("kubectl logs")
    assert "--selector=xpk.google.com/workload=ouro,jobset.sigs.k8s.io/job-index=1," in call[4]
    assert cluster.run("gke", "status", *GKE).status == 0
    assert cluster.calls("workload list")[0][3:] == ["--cluster=ouro", "--zone=us-east5-b", "--filter-by-job=ouro"]


def test_a_log_that_breaks_leaves_the_run_alone(cluster):
    cluster.fails("kubectl logs", "connection reset", status=1)
    done = cluster.run("gke", "follow", *GKE)
    assert done.status == 1
    assert "the log ended (status 1); the run continues if it was active: tpu gke status" in done.err


def test_stop_and_stop_again(cluster):
    cluster.run("gke", "launch", *GKE, *ARGUMENTS)
    done = cluster.run("gke", "stop", *GKE)
    assert done.err.endswith("tpu: nothing is running; the cluster still costs money: tpu gke delete\n")
    done = cluster.run("gke", "stop", *GKE)
    assert (done.status, done.err) == (0, "tpu: nothing runs as ouro; nothing was done\n")
    assert len(cluster.calls("workload delete")) == 1


def test_delete_asks_deletes_and_does_no_harm_twice(cluster):
    assert cluster.run("gke", "delete", *GKE).status == 2
    assert not cluster.calls()
    assert cluster.run("gke", "delete", *GKE, "--yes").status == 0
    done = cluster.run("gke", "delete", *GKE, "--yes")
    assert (done.status, done.err) == (0, "tpu: there is no cluster ouro; nothing was done\n")
    assert len(cluster.calls("cluster delete")) == 1


def test_a_delete_that_fails_warns_of_the_cost(cluster):
    cluster.fails("cluster delete", "[XPK] broken")
    done = cluster.run("gke", "delete", *GKE, "--yes")
    assert done.status == 1
    assert "may still cost money, see above; try again: xpk cluster delete --cluster=ouro" in done.err


@pytest.mark.parametrize(("tools", "missing"), [(("gcloud", "kubectl"), "xpk"), (("gcloud", "xpk"), "kubectl")])
def test_a_missing_tool_is_one_line(tmp_path, tools, missing):
    done = FakeCloud(tmp_path / "cloud", tools=tools).run("gke", "create", *GKE)
    assert done.status == 2
    assert done.err.startswith(f"tpu: {missing} is not installed: ")
    assert len(done.err.splitlines()) == 1
