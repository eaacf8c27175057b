"""Real processes that are killed at any moment, or that the disk refuses, leave the latest committed step intact."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from checkpoint_cases import assert_identical
from processes import running
from saver_program import abstract_state, metadata_of, state_of
from xla_flags import quick_to_compile

from looplm_jax.checkpoints import CheckpointStore

PROGRAM = Path(__file__).with_name("saver_program.py")
# The saver's numbers must equal those of this process: the same compiler options, on one device.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": quick_to_compile(devices=1), "JAX_PLATFORMS": "cpu"}
del ENVIRONMENT["JAX_COMPILATION_CACHE_DIR"]  # a kill may truncate an entry, which other processes must not read


def start(folder, *arguments):
    return running(
        [sys.executable, str(PROGRAM), str(folder), *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def newest(folder):
    """Restores the latest step that another process left in a folder, and compares it with the expected state."""
    store = CheckpointStore(folder, keep=2)
    committed = store.steps()[-1]
    restored = store.restore(abstract_state())
    assert restored.step == committed
    assert_identical(restored.state, state_of(jnp.int32(committed)))
    assert restored.metadata == metadata_of(committed)
    assert all("was not finished" in str(damaged) for damaged in restored.skipped)
    return committed


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_the_newest_committed_step_survives_every_kill(kills, tmp_path):
    chance = random.Random(0)
    reached = []
    for _ in range(kills):
        with start(tmp_path / "run") as process:
            assert process.stdout.readline()
            assert (
                process.stdout.readline()
            )  # a save begins when the previous one is committed: at least one step per round
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        reached.append(newest(tmp_path / "run"))
    assert reached == sorted(reached)
    assert reached[-1] >= kills


def test_a_disk_that_refuses_to_write_ends_in_one_line(tmp_path):
    folder = tmp_path / "run"
    store = CheckpointStore(folder, keep=2)
    store.save(1, state_of(jnp.int32(1)), metadata_of(1))
    store.close()
    with start(folder, "1000000") as process:
        _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        message
        == f"File too large while saving step 2 to {folder}: fix that and resume; step 1 is the latest valid one\n"
    )
    assert newest(folder) == 1
    assert os.listdir(folder) == ["1"]
