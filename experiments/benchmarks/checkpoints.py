"""Checkpoints on a local disk: write and read speed, and the time that a save adds to training.

    python -m experiments.benchmarks.checkpoints --folder runs/checkpoints

Trains models whose state (parameters, moments of AdamW, guard) has about the requested size, and saves and restores
with the same classes that training uses. For comparison it measures the disk with one plain file of the same size,
written with fsync, and read with none of it in the page cache; checkpoints are read in the same way. Every figure is
the median of `--rounds`. Needs free disk space of three times the largest state, and removes what it wrote.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.batches import random_batch
from looplm_jax.checkpoints import CheckpointStore, Metadata
from looplm_jax.codec import to_dict
from looplm_jax.config import ComputeConfig, Dtype, MeshConfig, ModelConfig, Recipe, Stage
from looplm_jax.distributed import SINGLE_PROCESS
from looplm_jax.models import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._saving import AsyncSaver
from looplm_jax.training._state import abstract_state, initial_state

_BYTES_PER_PARAMETER = 12  # float32 parameters and two moments
_LOOPS, _LENGTH, _VOCABULARY = 2, 128, 2048
_STEPS = 8  # without a save, per round
_BLOCK = 2**23


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds of one round, and the bytes of a step on disk.

    Attributes:
      write: writing a plain file of the state's size.
      read: reading that file.
      step: a training step without saves (median).
      save: a save from its start to its commit, with nothing else running.
      restore: reading it, including its digests.
      call: starting an asynchronous save, until training continues.
      first: the first step after that.
      during: the steps after it until the save is committed (median; that of `step` if there are none).
      behind: number of steps until the commit.
      stored: bytes of the step on disk.
    """

    write: float
    read: float
    step: float
    save: float
    restore: float
    call: float
    first: float
    during: float
    behind: int
    stored: int

    @property
    def stall(self) -> float:
        """Returns the seconds by which an asynchronous save delays training."""
        return self.call + self.first - self.step + (self.behind - 1) * (self.during - self.step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The rounds for a state of `state_bytes`."""

    state_bytes: int
    rounds: tuple[Round, ...]

    def median(self, name: str) -> float:
        """Returns the median of a figure over the rounds."""
        return statistics.median(getattr(a_round, name) for a_round in self.rounds)


class Trainer:
    """A model whose state has about `state_bytes`, and its train step."""

    def __init__(self, state_bytes: int):
        stage = Stage(
            name="bench", steps=100_000, batch_size=1, sequence_length=_LENGTH, loops=_LOOPS, beta=0.05,
            learning_rate=3e-4,
        )  # fmt: skip

        config = _model(state_bytes)
        self.recipe = Recipe(name="bench", model=config, stages=(stage,), compute=ComputeConfig(dtype=Dtype.FLOAT32))

        model, mesh = LoopLM(config, self.recipe.compute), make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self._programs = StagePrograms(self.recipe, model, stage, mesh, first_step=0)
        self._programs.compile(_LOOPS)

        self._batch = to_device(random_batch(config.vocab_size, sequences=1, length=_LENGTH), stage, mesh)
        self.abstract = abstract_state(self.recipe, model, stage, mesh)
        self.state = initial_state(self.recipe, model, stage, mesh)
        self.done = 0

    def step(self) -> None:
        """Runs one step to completion."""
        self.state, metrics = self._programs.run(_LOOPS, self.state, self._batch)
        self.done += 1
        # Reading the loss waits for the device.
        float(metrics.loss)

    def forget(self) -> None:
        """Frees the state, so that only one state is in memory during a restore."""
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()

    def save(self, saver: AsyncSaver) -> None:
        """Starts a save, as training does."""
        metadata = Metadata(
            config=to_dict(self.recipe), tokenizer_kind="none", tokenizer=b"", tokenizer_fingerprint="", data_state={}
        )
        saver.save(self.done, self.state, metadata, permanent=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write; must not exist")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000], help="sizes of the state")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    if options.folder.exists():
        parser.error("--folder must name a folder that does not exist")

    measured = []
    with contextlib.ExitStack() as closing:
        options.folder.mkdir(parents=True)
        closing.callback(shutil.rmtree, options.folder)
        for megabytes in options.megabytes:
            measured.append(measure(options.folder / str(megabytes), megabytes * 10**6, options.rounds))

    print(bandwidth_table(measured))
    print()
    print(stall_table(measured))


# Measuring


def measure(folder: Path, state_bytes: int, rounds: int) -> Measured:
    """Runs `rounds` rounds with one state. The first save, which compiles the digests, is not counted."""
    trainer = Trainer(state_bytes)
    store = CheckpointStore(folder, keep=1)
    saver = AsyncSaver(store, SINGLE_PROCESS)

    for _ in range(3):
        trainer.step()
    trainer.save(saver)
    saver.finish()

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state))
    return Measured(state_bytes=size, rounds=tuple(_round(folder, trainer, store, saver, size) for _ in range(rounds)))


def _round(folder: Path, trainer: Trainer, store: CheckpointStore, saver: AsyncSaver, size: int) -> Round:
    """Measures the plain file, steps, an asynchronous save, a synchronous save, and a restore."""
    plain = folder.with_suffix(".plain")
    write = _seconds(lambda: _write(plain, size))
    _forget(plain)
    read = _seconds(lambda: _read(plain))
    plain.unlink()

    steps = [_seconds(trainer.step) for _ in range(_STEPS)]
    saved = trainer.done
    call, first = _seconds(lambda: trainer.save(saver)), _seconds(trainer.step)
    during = list(_until_committed(trainer, store, saved))

    saver.finish()
    trainer.step()
    save = _seconds(lambda: trainer.save(saver)) + _seconds(saver.finish)
    # The restore has to read from disk, not from the page cache.
    _forget(folder)
    trainer.forget()
    restore = _seconds(lambda: _restore(trainer, store))

    return Round(
        write=write,
        read=read,
        step=statistics.median(steps),
        save=save,
        restore=restore,
        call=call,
        first=first,
        during=statistics.median(during or steps),
        behind=1 + len(during),
        stored=sum(path.stat().st_size for path in (folder / str(trainer.done)).rglob("*") if path.is_file()),
    )


# Tables


def bandwidth_table(measured: Sequence[Measured]) -> str:
    """Returns a table of speeds in MB/s, relative to the bytes of the state."""
    lines = [
        "| state | on the disk | plain write | save | of plain | plain read | restore | of plain |",
        "|---|---|---|---|---|---|---|---|",
    ]

    for one in measured:
        write, save, read, restore = (
            one.state_bytes / one.median(name) / 1e6 for name in ("write", "save", "read", "restore")
        )
        lines.append(
            f"| {one.state_bytes / 1e6:,.0f} MB | {one.median('stored') / 1e6:,.0f} MB | {write:,.0f} MB/s "
            f"| {save:,.0f} MB/s | {save / write:.2f} | {read:,.0f} MB/s | {restore:,.0f} MB/s | {restore / read:.2f} |"
        )
    return "\n".join(lines)


def stall_table(measured: Sequence[Measured]) -> str:
    """Returns a table of the time that a save adds to steps, if it is asynchronous and if training waits."""
    lines = [
        "| state | step | start of the save | next step | later steps | steps until commit | total stall "
        "| synchronous save |",
        "|---|---|---|---|---|---|---|---|",
    ]

    for one in measured:
        step, call, first, during, save = (one.median(name) for name in ("step", "call", "first", "during", "save"))
        lines.append(
            f"| {one.state_bytes / 1e6:,.0f} MB | {step:.2f} s | {call:.2f} s | {first:.2f} s | {during:.2f} s "
            f"| {one.median('behind'):.0f} | {one.median('stall'):.2f} s | {save:.2f} s |"
        )
    return "\n".join(lines)


# The model, its batch, and files


def _model(state_bytes: int) -> ModelConfig:
    """Returns a model of four layers, as wide as the size requires.

    A layer has 4 D^2 parameters in its attention and 8 D^2 in its feed-forward network.
    """
    wanted = state_bytes / _BYTES_PER_PARAMETER
    width = next(width for width in itertools.count(64, 64) if 48 * width**2 + 2 * _VOCABULARY * width >= wanted)
    return ModelConfig(
        vocab_size=_VOCABULARY, width=width, mlp_width=width * 8 // 3, num_layers=4, num_heads=width // 64,
        max_positions=_LENGTH,
    )  # fmt: skip


def _until_committed(trainer: Trainer, store: CheckpointStore, step: int) -> Iterator[float]:
    """Yields the seconds of each step until the save of step `step` is committed."""
    while step not in store.steps():
        yield _seconds(trainer.step)


def _restore(trainer: Trainer, store: CheckpointStore) -> None:
    """Restores the state, and waits until it is on the device."""
    trainer.state = jax.block_until_ready(store.restore(trainer.abstract).state)


def _seconds(work: Callable[[], Any]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _write(path: Path, size: int) -> None:
    """Writes a file of random bytes, and waits until it is on disk."""
    block = np.random.default_rng(0).bytes(min(size, _BLOCK))
    with path.open("wb") as stream:
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
        stream.flush()
        os.fsync(stream.fileno())


def _read(path: Path) -> None:
    """Reads a file without keeping it."""
    with path.open("rb", buffering=0) as stream:
        block = bytearray(_BLOCK)
        while stream.readinto(block):
            pass


def _forget(path: Path) -> None:
    """Writes files back to disk and drops them from the page cache."""
    for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        with file.open("rb") as stream:
            # Dirty pages cannot be dropped, so they are synchronized first.
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
