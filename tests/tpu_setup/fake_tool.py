"""A fake of gcloud, xpk, kubectl and docker: records each call, fails as the test plans, and simulates a small cloud.

The cloud is a folder: `calls.jsonl`, `cloud.json` (what exists, what fails), and `hosts/NODE-WORKER`, the home folder
of each worker, in which the commands of `ssh` really run. A test starts it dozens of times, so it imports little.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FOLDER = os.environ["FAKE_CLOUD"]
STATE = f"{FOLDER}/cloud.json"


def main() -> int:
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    with _cloud() as cloud:
        with open(f"{FOLDER}/calls.jsonl", "a") as calls:
            calls.write(json.dumps(words) + "\n")
        failure = _failure(words, cloud)
        if failure is not None and not failure["done"]:
            return _error(failure["says"], failure["status"])
        on_hosts = "tpu-vm" in words
        status = 0 if on_hosts else _act(words[0], words[1:], cloud)
    if on_hosts:
        status = _on_hosts(words[4], words[1:], cloud["workers"])
    return status if failure is None else _error(failure["says"], failure["status"])


@contextmanager
def _cloud() -> Iterator[dict]:
    """A context manager that locks the cloud and yields it."""
    with open(f"{FOLDER}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(STATE) as file:
            cloud = json.load(file)
        yield cloud
        with open(STATE, "w") as file:
            json.dump(cloud, file)


def _failure(words: list[str], cloud: dict) -> dict | None:
    """Returns the failure that the test planned for this call, and counts down how often it still occurs."""
    line = " ".join(words)
    for failure in cloud["failures"]:
        if failure["at"] in line and failure["times"] > 0:
            failure["after"] -= 1
            if failure["after"] < 0:
                failure["times"] -= 1
                return failure
    return None


def _act(tool: str, rest: list[str], cloud: dict) -> int:
    verb = " ".join(word for word in rest[:4] if not word.startswith("-"))
    if tool == "gcloud" and "queued-resources" in verb:
        return _queued_resource(rest[rest.index("queued-resources") + 1 :], cloud)
    if tool == "gcloud" and "clusters describe" in verb and rest[3] not in cloud["clusters"]:
        return _error(
            f"ERROR: (gcloud.container.clusters.describe) ResponseError: code=404, message=Not found: {rest[3]}"
        )
    if tool == "xpk":
        return _xpk(verb, rest, cloud)
    if tool == "kubectl" and verb.startswith("get jobset") and rest[2] in cloud["workloads"]:
        print(f"jobset.jobset.x-k8s.io/{rest[2]}")
    return 0


def _queued_resource(rest: list[str], cloud: dict) -> int:
    verb, name = rest[0], rest[1]
    existing = cloud["queued"].get(name)
    if verb == "create":
        if existing:
            return _error(f"ERROR: (gcloud) ALREADY_EXISTS: Resource '{name}' already exists")
        states = cloud["next_states"] or ["ACTIVE"]
        cloud["queued"][name] = {"accelerator": _flag(rest, "accelerator-type"), "states": states}
        import shutil

        shutil.rmtree(f"{FOLDER}/hosts", ignore_errors=True)
        return 0
    if existing is None:
        return _error(f"ERROR: (gcloud) NOT_FOUND: Resource '{name}' was not found")
    if verb == "delete":
        del cloud["queued"][name]
    elif "failedData" in _flag(rest, "format"):
        print("no capacity for you")
    else:
        state = existing["states"][0]
        existing["states"] = existing["states"][1:] or [state]
        print(f"{state}\t{existing['accelerator']}")
    return 0


def _on_hosts(verb: str, rest: list[str], workers: int) -> int:
    if verb == "ssh":
        return _ssh(_homes(rest[4], rest, workers), rest)
    import shutil

    source, (node, _, path) = rest[4], rest[5].partition(":")
    for home in _homes(node, rest, workers):
        shutil.copy(source, f"{home}/{path}")
    return 0


def _homes(node: str, rest: list[str], workers: int) -> list[str]:
    asked = _flag(rest, "worker")
    numbers = range(workers) if asked == "all" else [int(asked)]
    homes = [f"{FOLDER}/hosts/{node}-{number}" for number in numbers]
    for home in homes:
        os.makedirs(home, exist_ok=True)
    return homes


def _ssh(homes: list[str], rest: list[str]) -> int:
    worst = 0
    for home in homes:
        os.chdir(home)
        environment = os.environ | {"HOME": home, "FAKE_HOST": home.rpartition("/")[2]}
        status = os.spawnvpe(os.P_WAIT, "bash", ["bash", "-c", _flag(rest, "command")], environment)
        worst = worst or status
    return worst


def _xpk(verb: str, rest: list[str], cloud: dict) -> int:
    name = _flag(rest, "cluster")
    if verb.startswith("cluster create"):
        cloud["clusters"] = sorted({*cloud["clusters"], name})
    elif verb.startswith("cluster delete"):
        cloud["clusters"].remove(name)
    elif verb.startswith("workload create"):
        cloud["workloads"].append(_flag(rest, "workload"))
    elif verb.startswith("workload delete"):
        cloud["workloads"].remove(_flag(rest, "workload"))
    return 0


def _flag(words: list[str], name: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), "")


def _error(message: str, status: int = 1) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
