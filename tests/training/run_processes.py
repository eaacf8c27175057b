"""Runs `looplm train` as real processes and reads their run folders."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import quick_looplm
from processes import hangups_are_not_ignored
from training_cases import RECIPE
from xla_flags import quick_to_compile

from looplm_jax.checkpoints import CheckpointStore, inspect_steps
from looplm_jax.codec import to_dict
from looplm_jax.config import Recipe
from looplm_jax.training._metrics import read_metrics

PATIENCE = 240  # seconds, on a busy machine
RATES = ("tokens_per_second", "model_flops_per_second")
ONE_DEVICE = quick_to_compile(devices=1)


def write_recipe(path: Path, recipe: Recipe = RECIPE) -> Path:
    path.write_text(json.dumps(to_dict(recipe)))
    return path


class Run:
    """A process that trains in a run folder. Its standard error is redirected to a file, which `said` reads.

    `program` is Python code that may patch the library before it runs the command line of `looplm` in its arguments.
    """

    def __init__(self, *arguments: str | Path, errors: Path, compiled: Path | None = None, program: str = ""):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE, "COLUMNS": "80"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if compiled is None:
            environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        else:
            environment |= {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
            environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._errors = errors
        with errors.open("w") as stream:
            start = ["-c", program] if program else [quick_looplm.__file__]
            command = [sys.executable, *start, "train", *map(str, arguments)]
            with hangups_are_not_ignored():
                self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stream)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        """The standard error of the process so far."""
        return self._errors.read_text()

    def wait_until(self, condition) -> None:
        """Waits until `condition()`; fails if the process ends first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def finish(self) -> int:
        """Returns the exit status."""
        return self.process.wait(timeout=PATIENCE)

    def stop(self, number: int) -> float:
        """Sends a signal. Returns the seconds until the process has ended."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout=PATIENCE)
        return time.monotonic() - started


def steps_logged(folder: Path) -> int:
    """Returns the latest step in the metrics, 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return max((row["step"] for row in read_metrics(folder)), default=0)
    return 0


def metrics(folder: Path, kinds: tuple[str, ...] = ("train", "evaluation")) -> list[dict]:
    """Returns every line of the metrics without the fields that depend on the clock."""
    rows = [row for row in read_metrics(folder) if row["kind"] in kinds]
    return [{name: value for name, value in row.items() if not _is_timed(name)} for row in rows]


def _is_timed(name: str) -> bool:
    return name in RATES or name.startswith("seconds_in_")


def newest(folder: Path) -> dict:
    """Returns the verified arrays of the latest step, and the position in the data."""
    report = inspect_steps(str(folder))[0]
    assert report.damage is None
    abstract = {name: jax.ShapeDtypeStruct(record.shape, record.dtype) for name, record in report.arrays.items()}
    restored = CheckpointStore(folder / "checkpoints", keep=9).restore(abstract, report.step)
    return {"step": report.step, "data": restored.metadata.data_state, "state": restored.state}
