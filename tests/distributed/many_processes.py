"""`looplm train` as several real processes on this machine, which connect over TCP and compute over gloo."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import quick_looplm
from xla_flags import quick_to_compile

from looplm_jax.codec import to_dict
from looplm_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    Recipe,
    Remat,
    SourceConfig,
    Stage,
)
from looplm_jax.training._metrics import read_metrics

PATIENCE = 240
RECIPE = Recipe(
    name="many",
    model=ModelConfig(vocab_size=12, width=16, mlp_width=24, num_layers=1, num_heads=2, loops=2, max_positions=64),
    stages=(Stage(name="pretrain", steps=6, batch_size=8, sequence_length=16, loops=2, learning_rate=1e-2),),
    compute=ComputeConfig(remat=Remat.NONE, loss_chunk=16),
    mesh=MeshConfig(data=-1),
    data=DataConfig(sources=(SourceConfig(path="mano:length=2,modulus=5"),)),
    checkpoint=CheckpointConfig(every=2, keep=9),
    evaluation=EvaluationConfig(every=3, sequences=8),
    log_every=1,
)


def write_recipe(path: Path, *, steps: int = 6) -> Path:
    stages = (dataclasses.replace(RECIPE.stages[0], steps=steps),)
    path.write_text(json.dumps(to_dict(dataclasses.replace(RECIPE, stages=stages))))
    return path


class Processes:
    """One process for each list of flags; each gets its own flags and the common ones."""

    def __init__(self, folder: Path, own: Sequence[Sequence[str]], *shared: str | Path, compiled: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._errors = [folder / f"errors-{index}" for index in range(len(own))]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": quick_to_compile(devices=1),
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        coordinator = f"localhost:{_free_port()}"
        self.processes, self._copies = [], []
        for index, flags in enumerate(own):
            joining = ["--coordinator", coordinator, "--processes", str(len(own)), "--process", str(index)]
            command = [sys.executable, quick_looplm.__file__, "train", *map(str, shared), *flags]
            process = subprocess.Popen(
                command + (joining if len(own) > 1 else []),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self.processes.append(process)
            self._errors[index].touch()
            copy = threading.Thread(target=_copy, args=(process.stderr, self._errors[index]), daemon=True)
            copy.start()
            self._copies.append(copy)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for copy in self._copies:
            copy.join(PATIENCE)

    def said(self, index: int) -> str:
        """Returns the standard error of a process so far."""
        return self._errors[index].read_text()

    def last_lines(self) -> list[str]:
        """Returns the last line of each process."""
        return [(self.said(index).splitlines() or [""])[-1] for index in range(len(self.processes))]

    def wait_for_step(self, folder: Path, step: int) -> None:
        """Waits until a step is in the metrics."""
        self.wait_until(lambda: steps_logged(folder) >= step)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition()`; fails if a process ends first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.everything()
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.02)

    def finish(self) -> list[int]:
        """Returns all exit statuses, once all output of the processes has arrived."""
        statuses = [process.wait(timeout=PATIENCE) for process in self.processes]
        for copy in self._copies:
            copy.join(PATIENCE)
        return statuses

    def everything(self) -> str:
        """Returns all standard errors, for the message of a failed test."""
        return "\n".join(f"process {index}:\n{self.said(index)}" for index in range(len(self.processes)))

    def send(self, index: int, number: signal.Signals) -> None:
        """Sends a signal to one of the processes."""
        self.processes[index].send_signal(number)


def steps_logged(folder: Path) -> int:
    """Returns the latest step in the metrics, 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return max((row["step"] for row in read_metrics(folder)), default=0)
    return 0


def losses(folder: Path, kind: str = "train") -> dict[int, list[float]]:
    """Returns the losses of every step."""
    return {row["step"]: row["loss_per_loop"] for row in read_metrics(folder) if row["kind"] == kind}


def _copy(stream: IO[bytes], path: Path) -> None:
    """Copies a stream to a file as it arrives, because the process may be limited in the size of its own files."""
    with stream, path.open("wb") as file:
        while chunk := os.read(stream.fileno(), 2**16):
            file.write(chunk)
            file.flush()


def _free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]
