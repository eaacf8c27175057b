"""A fake cloud in a folder, and the `tpu` command, which can use no other program."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TPU = ROOT / "tpu_setup" / "tpu"
FLAGS = ["--name", "ouro", "--zone", "us-east5-b", "--accelerator", "v6e-16", "--out", "gs://bucket/run", "--poll", "0"]
ARGUMENTS = ["--", "--recipe", "ouro-1.4b"]

# The only programs that the scripts find; the real gcloud of a developer's machine is not among them.
_SYSTEM = shlex.split(
    "bash env dirname mktemp rm cat grep tail tar gzip find sort xargs cksum cut tr sleep mv mkdir cmp kill date nohup "
    "setsid touch chmod"
)

# A fake of uv for prepare.sh: an environment whose `looplm` does what $FAKE_LOOPLM says.
_UV = """#!/usr/bin/env bash
echo "uv $*" >>"$HOME/installs"
[[ $1 == venv ]] || exit 0
mkdir -p "${@: -1}/bin"
printf '#!/usr/bin/env bash\\necho "looplm got: $*"\\neval "$FAKE_LOOPLM"\\n' >"${@: -1}/bin/looplm"
chmod +x "${@: -1}/bin/looplm"
"""
_PYTHON3 = f"""#!/usr/bin/env bash
echo "python3 $*" >>"$HOME/installs"
mkdir -p "$HOME/looplm/uv/bin"
printf '%s' {shlex.quote(_UV)} >"$HOME/looplm/uv/bin/uv"
chmod +x "$HOME/looplm/uv/bin/uv"
"""

RUNS_UNTIL_STOPPED = "trap 'echo saved; exit 143' TERM; while :; do sleep 0.05; done"


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


class FakeCloud:
    """A fake cloud. `run` runs a command of `tpu`, `fails` plans a failure, `calls` returns the calls of the fakes."""

    def __init__(self, folder: Path, *, tools: tuple[str, ...] = ("gcloud", "xpk", "kubectl", "docker")):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in _SYSTEM:
            (self.bin / name).symlink_to(str(shutil.which(name)))
        for name in tools:
            self._script(name, f"#!{sys.executable} -IS\n" + (Path(__file__).parent / "fake_tool.py").read_text())
        self._script("hostname", '#!/usr/bin/env bash\necho "$FAKE_HOST"\n')
        self._script("python3", _PYTHON3)
        self.cloud = {"queued": {}, "clusters": [], "workloads": [], "failures": [], "next_states": [], "workers": 2}
        self._write()

    def _script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def _write(self) -> None:
        (self.folder / "cloud.json").write_text(json.dumps(self.cloud))

    def state(self) -> dict:
        return json.loads((self.folder / "cloud.json").read_text())

    def change(self, **changes: object) -> None:
        self.cloud = self.state() | changes
        self._write()

    def holds(self, *states: str, accelerator: str = "v6e-16") -> None:
        """Adds a queued resource `ouro` that shows these states, one for each query."""
        self.change(queued={"ouro": {"accelerator": accelerator, "states": list(states)}})

    def fails(self, at: str, says: str, *, status: int = 1, times: int = 1, after: int = 0, done: bool = False) -> None:
        """Makes calls that contain `at` fail after the first `after` ones. With `done`, they take effect anyway."""
        failure = {"at": at, "says": says, "status": status, "times": times, "after": after, "done": done}
        self.change(failures=[*self.state()["failures"], failure])

    def environment(self, **extra: str) -> dict[str, str]:
        return {
            "PATH": str(self.bin),
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "FAKE_CLOUD": str(self.folder),
            "FAKE_LOOPLM": RUNS_UNTIL_STOPPED,
            "LOOPLM_PAUSE_SECONDS": "0",
            **extra,
        }

    def run(self, *words: str, **extra: str) -> Result:
        done = subprocess.run(
            [TPU, *words],
            env=self.environment(**extra),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def calls(self, containing: str = "") -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [words for words in map(json.loads, lines) if containing in " ".join(words)]

    def forget_calls(self) -> None:
        (self.folder / "calls.jsonl").unlink(missing_ok=True)

    def hosts(self) -> list[Path]:
        return sorted((self.folder / "hosts").glob("*"))

    def host_text(self, name: str) -> list[str]:
        """Returns the text of a file in the looplm folder of every host."""
        return [(home / "looplm" / name).read_text() for home in self.hosts()]

    def end_processes(self) -> None:
        """Kills the supervisors that a test left, with their children."""
        for file in self.folder.glob("hosts/*/looplm/run/pid"):
            try:
                os.killpg(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


def fake_cloud(folder: Path) -> Iterator[FakeCloud]:
    cloud = FakeCloud(folder)
    yield cloud
    cloud.end_processes()
