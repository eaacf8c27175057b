"""Errors in options, the sources of settings, and the output of a dry run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import ARGUMENTS, FLAGS, ROOT, TPU, FakeCloud
from hypothesis import given
from hypothesis import strategies as st

SETUP = ROOT / "tpu_setup"
COMMANDS = ["create", "prepare", "launch", "follow", "status", "stop", "restart", "watch", "delete", "list"]
GKE_COMMANDS = ["gke create", "gke prepare", "gke launch", "gke follow", "gke status", "gke stop", "gke delete"]
AWKWARD = ["--", "--recipe", 'it\'s "$HOME" `x` $(x) \\ *', "--empty", ""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["creat"], "unknown command 'creat'; `tpu --help` lists them"),
        (["gke", "watch"], "unknown command 'gke watch'; `tpu --help` lists them"),
        (["create", "--zoen", "x"], "unknown flag '--zoen'; `tpu --help` lists them"),
        (["create", "--capacity", "spot"], "unknown flag '--capacity'; `tpu --help` lists them"),
        (["create", "ouro"], "'ouro' is not a flag; arguments of looplm train go after --"),
        (["create", "--name"], "--name needs a value"),
        (["create", "--name="], "--name needs a value"),
        (["create"], "say --name (or LOOPLM_NAME); `tpu --help` says what it is"),
        (["create", "--name", "ouro"], "say --zone (or LOOPLM_ZONE); `tpu --help` says what it is"),
        (["create", "--name", "My TPU"], "--name 'My TPU' must be at most 40 lower-case letters, digits and dashes, a"),
        (["create", "--name", "a; rm -rf /"], "--name 'a; rm -rf /' must be at most 40 lower-case letters"),
        (["create", "--zone", "us-east5"], "--zone 'us-east5' is not a zone such as us-east5-b"),
        (["create", *FLAGS, "--accelerator", "h100"], "unknown accelerator 'h100': v5litepod-N, v6e-N, v5p-N, v4-N"),
        (["create", *FLAGS, "--accelerator", "tpu7x-8"], "TPU7x is offered on GKE only: `tpu gke create`"),
        (["create", *FLAGS, "--slices", "two"], "--slices 'two' is not a number"),
        (["create", *FLAGS, "--slices", "0"], "--slices must be at least 1"),
        (
            ["launch", *FLAGS, "--out", "runs/x", *ARGUMENTS],
            "--out 'runs/x' must be gs://BUCKET/RUN: the hosts share no",
        ),
        (["launch", *FLAGS], "say what to train after --, such as: tpu launch ... -- --recipe ouro-1.4b"),
        (["launch", *FLAGS, "--", "--out", "gs://b/r"], "--out goes before --, where restarting needs it too"),
        (["launch", *FLAGS, "--host-env", "/nowhere", *ARGUMENTS], "--host-env /nowhere cannot be read"),
        (["create", "--env", "/nowhere"], "/nowhere cannot be read; copy tpu_setup/example.env"),
        (["gke", "create", *FLAGS, "--reserved"], "on GKE a reservation has a name: --reservation NAME"),
        (["gke", "launch", *FLAGS, "--image", "i", "--", "a\nb"], "an argument of looplm train holds a line break"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_done(cloud, words, message):
    done = cloud.run(*words)
    assert done.status == 2
    assert done.err.startswith(f"tpu: {message}")
    assert len(done.err.splitlines()) == 1
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("LOOPLM_COLOUR=red", "line 2: 'LOOPLM_COLOUR' is not a setting; tpu_setup/example.env lists them"),
        ("rm -rf /", "line 2: 'rm -rf /' is not a setting"),
        ("LOOPLM_CAPACITY=free", "LOOPLM_CAPACITY 'free' must be spot, on-demand or reserved"),
    ],
)
def test_a_mistake_in_the_file_is_named(cloud, tmp_path, line, message):
    (tmp_path / "tpu.env").write_text(f"# mine\n{line}\n")
    done = cloud.run("create", *FLAGS, "--env", str(tmp_path / "tpu.env"))
    assert done.status == 2
    assert message in done.err


def test_a_flag_wins_over_the_environment_and_that_over_the_file(cloud, tmp_path):
    file = tmp_path / "tpu.env"
    file.write_text("LOOPLM_NAME='from-file'\nLOOPLM_ZONE=\"us-east5-a\"\nLOOPLM_ACCELERATOR=v6e-8")
    words = ("create", "--env", str(file), "--dry-run", "--zone", "us-east5-c")
    assert " create from-file --zone=us-east5-c --accelerator-type=v6e-8 " in cloud.run(*words).out
    assert " create from-env --zone=us-east5-c " in cloud.run(*words, LOOPLM_NAME="from-env", LOOPLM_ZONE="us-a1-b").out


def test_nothing_in_the_file_is_executed(cloud, tmp_path):
    (tmp_path / "tpu.env").write_text(f"LOOPLM_RESERVATION=$(touch {tmp_path}/executed)\n")
    done = cloud.run("create", *FLAGS, "--env", str(tmp_path / "tpu.env"), "--dry-run")
    assert f"'--reservation=$(touch {tmp_path}/executed)'" in done.out
    assert not (tmp_path / "executed").exists()


def test_the_example_file_is_one(cloud):
    done = cloud.run("create", "--env", str(SETUP / "example.env"), "--dry-run")
    assert done.status == 0
    assert "create ouro --zone=us-east5-b --project=my-project --accelerator-type=v6e-256" in done.out


def test_every_setting_of_the_example_file_is_known(cloud, tmp_path):
    text = re.sub(r"^# (LOOPLM_)", r"\1", (SETUP / "example.env").read_text(), flags=re.MULTILINE)
    (tmp_path / "tpu.env").write_text(text.replace("tpu_setup/libtpu.env", str(SETUP / "libtpu.env")))
    assert cloud.run("create", "--env", str(tmp_path / "tpu.env"), "--dry-run").status == 0


def test_help_names_every_command_and_needs_nothing(tmp_path):
    cloud = FakeCloud(tmp_path / "cloud", tools=())
    done = cloud.run("--help")
    assert done.status == 0
    assert cloud.run().out == done.out
    assert all(re.search(rf"\b{command.split()[-1]}\b", done.out) for command in COMMANDS + GKE_COMMANDS)


@pytest.mark.parametrize("command", COMMANDS + GKE_COMMANDS)
def test_a_dry_run_needs_nothing_and_runs_nothing(tmp_path, command):
    cloud = FakeCloud(tmp_path / "cloud", tools=())
    done = cloud.run(*command.split(), *FLAGS, "--image", "image:1", "--dry-run", *AWKWARD)
    assert done.status == 0
    assert done.out
    assert not cloud.calls()


@pytest.mark.parametrize(
    "command", ["create", "launch --slices 2", "stop", "list", "gke create", "gke prepare", "gke launch"]
)
def test_a_dry_run_is_a_script_of_the_very_calls_of_a_real_run(cloud, command):
    if command.startswith(("launch", "stop")):
        cloud.holds("ACTIVE")
    words = (*command.split(), *FLAGS, "--image", "image:1", "--create-flag=--labels=a=b c")
    dry = cloud.run(*words, "--dry-run", *AWKWARD)
    assert not cloud.calls()
    cloud.run(*words, *AWKWARD)
    real = sorted(words for words in cloud.calls() if words[:3] != ["kubectl", "get", "jobset"])
    cloud.forget_calls()
    subprocess.run(["bash", "-c", dry.out], env=cloud.environment(), capture_output=True, timeout=60)
    assert sorted(cloud.calls()) == real
    assert [shlex.split(line) for line in dry.out.splitlines()] == cloud.calls()


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=5))
def test_any_words_survive_quoting(words):
    script = 'source "$1"; shift; eval "set -- $(quoted "$@")"; printf "%s\\0" "$@"'
    command = ["bash", "-c", script, "bash", SETUP / "lib/commands.sh", *words]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.decode() == "".join(f"{word}\0" for word in words) or not words


def test_old_bash_is_refused_in_one_line(tmp_path):
    script = re.sub(r"\$\{BASH_VERSINFO\[(\d)\]\}", r"3", TPU.read_text()).replace(":-}", ":-x}")
    (tmp_path / "tpu").write_text(script)
    done = subprocess.run(["bash", tmp_path / "tpu", "create"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "tpu: needs bash 4.4 or newer (macOS: brew install bash)\n")


def test_the_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install -r requirements-dev.txt")
    scripts = [TPU, *sorted((SETUP / "host").glob("*.sh"))]
    done = subprocess.run(
        [shellcheck, "--external-sources", "--check-sourced", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_every_script_that_is_run_is_strict():
    for script in [TPU, *(SETUP / "host").glob("*.sh")]:
        if script.name == "run_state.sh":
            continue
        strict = "set -uo pipefail" if script.name == "supervise.sh" else "set -euo pipefail"
        assert strict in script.read_text(), script


def test_libtpu_knows_the_settings_of_libtpu_env():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jax[tpu]'")
    lines = re.findall(r"^#? ?LIBTPU_INIT_ARGS=(.*)$", (SETUP / "libtpu.env").read_text(), flags=re.MULTILINE)
    assert len(lines) == 2
    assert _compiles_for_tpu(" ".join(lines))
    assert not _compiles_for_tpu("--no_such_flag=1")


def _compiles_for_tpu(init_args: str) -> bool:
    program = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices), ("x",))
argument = jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(mesh, P("x")))
jax.jit(lambda a: a.sum()).trace(argument).lower(lowering_platforms=("tpu",)).compile()
"""
    environment = os.environ | {"LIBTPU_INIT_ARGS": init_args, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment |= {"TPU_ACCELERATOR_TYPE": "v6e-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # another test may compile for a TPU at this moment
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=300)
    return done.returncode == 0


def _documented_commands():
    text = (ROOT / "docs/tpu.md").read_text()
    return sorted(set(re.findall(r"^tpu_setup/tpu (.+?)(?:  +#.*)?$", text, flags=re.MULTILINE)))


@pytest.mark.parametrize("line", _documented_commands())
def test_every_command_of_the_page_is_one(cloud, line):
    shutil.copy(SETUP / "example.env", cloud.folder / "tpu.env")
    flags, *arguments = line.split(" -- ")
    words = [*shlex.split(flags), "--dry-run", *(["--", *shlex.split(arguments[0])] if arguments else [])]
    done = cloud.run(*words, LOOPLM_IMAGE="image:1")
    assert done.status == 0, done.err
    assert done.out


def test_the_page_shows_every_command():
    shown = {" ".join(line.split()[: 2 if line.startswith("gke") else 1]) for line in _documented_commands()}
    assert shown == {*COMMANDS, *GKE_COMMANDS} - {"restart"}
