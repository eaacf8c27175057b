import errno
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import abstract, assert_identical, make_metadata, make_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from looplm_jax.checkpoints import CheckpointStore, Metadata, _store, read_metadata, restore_params
from looplm_jax.checkpoints._step import AsyncWrite
from looplm_jax.errors import UserError


def save(store, *steps, **options):
    for step in steps:
        store.save(step, make_state(step), make_metadata(step), **options)
    store.wait()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_state_and_its_metadata_come_back_bit_for_bit(folder, asynchronous):
    store = CheckpointStore(folder, keep=2, asynchronous=asynchronous)
    save(store, 3)
    store.close()
    restored = CheckpointStore(folder, keep=2).restore(abstract(make_state()))
    assert_identical(restored.state, make_state(3))
    assert (restored.step, restored.metadata, restored.skipped) == (3, make_metadata(3), ())


def test_the_metadata_may_say_what_the_state_is(folder):
    store = CheckpointStore(folder, keep=2)
    save(store, 3)
    restored = store.restore(lambda metadata: abstract(make_state(metadata.data_state["position"])))
    assert_identical(restored.state, make_state(3))


def test_buffers_may_be_donated_as_soon_as_save_returns(folder):
    add_one = jax.jit(lambda x: x + jnp.float32(1), donate_argnums=0)
    store = CheckpointStore(folder, keep=9)
    x = jnp.zeros((500, 1000))
    for step in range(5):
        store.save(step, {"x": x}, make_metadata())
        for _ in range(3):
            x = add_one(x)
    store.close()
    for step in range(5):
        assert (store.restore(abstract({"x": x}), step).state["x"] == 3 * step).all()


def test_the_newest_and_the_permanent_steps_are_kept(folder):
    store = CheckpointStore(folder, keep=2)
    save(store, 1)
    save(store, 2, permanent=True)
    save(store, 3, 4, 5)
    assert store.steps() == [2, 4, 5]
    assert_identical(store.restore(abstract(make_state()), 2).state, make_state(2))


def test_the_old_step_is_there_until_the_new_one_is_committed(folder):
    store = CheckpointStore(folder, keep=1)
    save(store, 1)
    store.save(2, make_state(2), make_metadata(2))
    assert 1 in store.steps()
    store.wait()
    assert store.steps() == [2]


def test_the_current_step_is_not_saved_twice(folder):
    store = CheckpointStore(folder, keep=2)
    save(store, 1, 1)
    assert store.steps() == [1]


@pytest.mark.parametrize("step", [4, 5])
def test_a_folder_with_steps_as_new_is_not_overwritten(folder, step):
    save(CheckpointStore(folder, keep=2), 5)
    with pytest.raises(UserError, match=f"already holds step 5, cannot save step {step}: continue from the newest"):
        save(CheckpointStore(folder, keep=2), step)


def test_the_data_state_of_a_step_saved_by_more_processes_is_that_of_all(folder):
    store = CheckpointStore(folder, keep=2)
    save(store, 1)
    sidecar = folder / "1" / "sidecar" / "data.json"
    body = json.loads(json.loads(sidecar.read_text())["body"])
    states = [{"lanes": {"0": {"at": 3}, "1": {"at": 4}}}, {"lanes": {"1": {"at": 4}, "2": {"at": 5}}}]
    text = json.dumps({**body, "data_state": states})
    sidecar.write_text(json.dumps({"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    whole = {"lanes": {"0": {"at": 3}, "1": {"at": 4}, "2": {"at": 5}}}
    assert store.restore(abstract(make_state())).metadata.data_state == whole
    assert read_metadata(str(folder)).data_state == whole


def test_arrays_that_differ_are_named(folder):
    store = CheckpointStore(folder, keep=2)
    save(store, 1)
    wanted = abstract(make_state())
    wanted = wanted.replace(params={**wanted.params, "embed": jax.ShapeDtypeStruct((16, 9), jnp.float32)}, flags=())
    with pytest.raises(
        UserError, match=r"params.embed: float32\[64,32\] there, float32\[16,9\] wanted; .*; and 2 more"
    ):
        store.restore(wanted)


def test_two_arrays_of_one_name_are_refused(folder):
    with pytest.raises(ValueError, match=r"two arrays of the state are called 'a\.b'"):
        CheckpointStore(folder, keep=1).save(1, {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, make_metadata())


def test_a_folder_without_steps_is_not_a_checkpoint(folder):
    with pytest.raises(UserError, match="is not a checkpoint"):
        CheckpointStore(folder, keep=1).restore(abstract(make_state()))
    assert CheckpointStore(folder, keep=1).steps() == []


@pytest.mark.parametrize("tail", ["", "checkpoints", "checkpoints/2"])
def test_a_run_its_checkpoints_and_one_step_are_all_paths_to_a_checkpoint(folder, tail):
    save(CheckpointStore(folder, keep=2), 1, 2)
    path = str(folder.parent / tail)
    assert read_metadata(path) == make_metadata(2)
    restored = restore_params(path, abstract(make_state().params))
    assert_identical(restored.state, make_state(2).params)
    assert restored.step == 2


def test_a_step_can_be_chosen(folder):
    save(CheckpointStore(folder, keep=2), 1, 2)
    assert read_metadata(str(folder), 1) == make_metadata(1)
    assert read_metadata(str(folder / "1")) == make_metadata(1)
    with pytest.raises(UserError, match="holds no step 7; it holds 1, 2"):
        read_metadata(str(folder), 7)


@pytest.mark.parametrize("tail", ["", "missing", "file.txt", "empty"])
def test_a_path_that_is_not_a_checkpoint_is_refused(tmp_path, tail):
    (tmp_path / "file.txt").write_text("no")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is not a checkpoint: expected a run folder with checkpoints/<step>") as error:
        read_metadata(str(tmp_path / tail))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_restored_replicas_may_be_donated(folder):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    x = jax.device_put(jnp.arange(64.0), NamedSharding(mesh, PartitionSpec()))
    store = CheckpointStore(folder, keep=1)
    store.save(1, {"x": x}, make_metadata())
    store.wait()
    restored = store.restore(abstract({"x": x})).state["x"]
    doubled = jax.jit(lambda x: x + x, donate_argnums=0)(restored)
    assert all((np.asarray(shard.data) == 2 * np.arange(64)).all() for shard in doubled.addressable_shards)


def test_without_a_sharding_an_array_goes_to_the_first_device(folder):
    store = CheckpointStore(folder, keep=1)
    store.save(1, {"x": jnp.ones(3)}, make_metadata())
    store.wait()
    restored = store.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}).state["x"]
    assert restored.devices() == {jax.devices()[0]}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_state_is_restored_to_another_sharding(folder):
    def mesh(*shape):
        count = shape[0] * shape[1]
        return jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])

    state = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "n": jnp.int32(3)}
    specs = {"w": PartitionSpec("x", "y"), "n": PartitionSpec()}

    def shardings(shape):
        return {name: NamedSharding(mesh(*shape), spec) for name, spec in specs.items()}

    store = CheckpointStore(folder, keep=1)
    store.save(1, jax.device_put(state, shardings((4, 2))), make_metadata())
    store.wait()
    for shape in ((8, 1), (2, 4), (1, 1)):
        wanted = shardings(shape)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, wanted)
        restored = store.restore(target).state
        assert_identical(restored, state)
        assert restored["w"].sharding == wanted["w"]


class Failing:
    def __init__(self, error):
        self.error = error

    def result(self):
        raise self.error


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("RESOURCE_EXHAUSTED: Error writing [OS error 28: ENOSPC No space left on device]"),
    ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"),
)


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_one_line_and_leaves_the_older_steps(folder, monkeypatch, error, background):
    def start(path, *_, **__):
        path.with_name(path.name + ".orbax-checkpoint-tmp").mkdir()
        if background:
            return Failing(error)
        raise error

    store = CheckpointStore(folder, keep=2)
    save(store, 1)
    monkeypatch.setattr(_store, "start_write", start)
    with pytest.raises(UserError) as caught:
        save(store, 2)
    assert str(caught.value) == (
        f"no space left on the disk while saving step 2 to {folder}: free space and resume; "
        "step 1 is the latest valid one"
    )
    monkeypatch.undo()
    assert os.listdir(folder) == ["1"]
    save(store, 2)
    assert_identical(store.restore(abstract(make_state())).state, make_state(2))


def test_a_full_disk_at_the_first_save_says_that_nothing_was_saved(folder, monkeypatch):
    monkeypatch.setattr(_store, "start_write", lambda *_, **__: Failing(FULL[0]))
    with pytest.raises(UserError, match="no step was saved before"):
        save(CheckpointStore(folder, keep=2), 1)


def test_another_refusal_of_the_disk_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory while saving step 1 to .*: fix that and resume"):
        save(CheckpointStore(tmp_path / "file", keep=2), 1)


def test_a_mistake_of_the_program_is_not_taken_for_a_full_disk(folder, monkeypatch):
    monkeypatch.setattr(_store, "start_write", lambda *_, **__: Failing(KeyError("bug")))
    with pytest.raises(KeyError, match="bug"):
        save(CheckpointStore(folder, keep=2), 1)


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("created_again", [True, False])
def test_a_folder_that_is_removed_during_a_save_is_named_and_stays_removed(lost, created_again, folder, monkeypatch):
    class Late(Failing):
        def result(self):
            if lost:
                shutil.rmtree(folder)
            if lost and created_again:  # as Orbax does
                (folder / "2.orbax-checkpoint-tmp").mkdir(parents=True)
            super().result()

    def start(path, *_, **__):
        return AsyncWrite(Late(ValueError("No ArrayMetadata found")), path.parent)

    store = CheckpointStore(folder, keep=2)
    save(store, 1)
    monkeypatch.setattr(_store, "start_write", start)
    with pytest.raises(UserError if lost else ValueError) as error:
        save(store, 2)
    if lost:
        assert str(error.value).startswith(f"No such file or directory while saving step 2 to {folder}: ")
    assert folder.exists() == (not lost)


def test_metadata_needs_no_extras(folder):
    metadata = Metadata(config={}, tokenizer_kind="x", tokenizer=b"", tokenizer_fingerprint="", data_state={})
    store = CheckpointStore(folder, keep=2)
    store.save(1, make_state(), metadata)
    store.close()
    assert read_metadata(str(folder)) == metadata
