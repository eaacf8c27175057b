"""Steps as flat arrays: read by name, and written completely or not at all."""

import dataclasses
import errno
import sys
import warnings

import numpy as np
import pytest
from checkpoint_cases import make_metadata, make_state
from full_disk import files_of_at_most

from looplm_jax.checkpoints import CheckpointStore, _raw, _store
from looplm_jax.checkpoints._arrays import flatten
from looplm_jax.checkpoints._raw import RawStep, read_array_info, read_raw, write_raw
from looplm_jax.errors import UserError

WHOLE = RawStep(step=3, arrays=flatten(make_state(3)), metadata=make_metadata(3))


def assert_same_arrays(arrays, wanted):
    assert list(arrays) == list(wanted)
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape)
        assert np.asarray(array).tobytes() == np.asarray(wanted[name]).tobytes()


def test_what_is_written_is_read_and_is_a_step_like_any_other(tmp_path):
    write_raw(tmp_path, WHOLE)
    read = read_raw(tmp_path)
    assert (read.step, read.metadata, read.skipped) == (3, WHOLE.metadata, ())
    assert_same_arrays(read.arrays, WHOLE.arrays)
    records = read_array_info(tmp_path / "checkpoints" / "3")
    assert {name: (record.shape, record.dtype) for name, record in records.items()} == {
        name: (array.shape, str(array.dtype)) for name, array in WHOLE.arrays.items()
    }
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    for step in (4, 5):
        store.save(step, make_state(step), make_metadata(step))
    store.close()
    assert store.steps() == [3, 5]  # it is permanent


def test_a_damaged_step_is_skipped_and_named(tmp_path):
    write_raw(tmp_path, WHOLE)
    write_raw(tmp_path, dataclasses.replace(WHOLE, step=4))
    for path in (tmp_path / "checkpoints" / "4" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    read = read_raw(tmp_path)
    assert (read.step, [damaged.step for damaged in read.skipped]) == (3, [4])
    assert read_raw(tmp_path, step=3).step == 3
    with pytest.raises(UserError, match="step 4 is damaged"):
        read_raw(tmp_path, step=4)


def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(tmp_path, capfd):
    write_raw(tmp_path, dataclasses.replace(WHOLE, step=2))
    with files_of_at_most(3000), pytest.raises(UserError) as caught:
        write_raw(tmp_path, WHOLE)
    assert str(caught.value) == (
        f"File too large while writing {tmp_path}/checkpoints/3: fix that and run the same command again"
    )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert read_raw(tmp_path).step == 2
    assert capfd.readouterr().err == ""


async def async_serialize_from_host():
    """A coroutine with the name of one of Orbax's coroutines."""


async def of_a_user():
    """A coroutine with a different name."""


@pytest.mark.parametrize("filters", ["ours", "reset"])
def test_reports_of_a_failed_save_are_silent_and_all_others_are_not(filters, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    with warnings.catch_warnings():
        _store.silence_late_reports()
        if filters == "reset":
            warnings.simplefilter("error")
        async_serialize_from_host()
        of_a_user()
    assert heard == ["coroutine 'of_a_user' was never awaited"]

    class Freed:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    Freed("Event loop is closed")
    Freed("another")
    assert heard[1:] == ["another"]


def test_a_disk_that_refuses_to_list_as_well_does_not_hide_why_it_refused(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_store, "list_steps", refuse)
    with files_of_at_most(3000), pytest.raises(UserError) as caught:
        write_raw(tmp_path, WHOLE)
    assert str(caught.value).startswith(f"File too large while writing {tmp_path}/checkpoints/3: ")


def test_a_mistake_of_the_program_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a mistake")

    monkeypatch.setattr(_raw, "start_write", fail)
    with pytest.raises(KeyError, match="a mistake"):
        write_raw(tmp_path, WHOLE)
