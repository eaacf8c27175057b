"""Damage is caught and named, and the newest good step is used."""

import shutil

import pytest
from checkpoint_cases import abstract, assert_identical, make_metadata, make_state, step_folder

from looplm_jax.checkpoints import CheckpointStore, arrays, read_metadata
from looplm_jax.checkpoints.step import delete
from looplm_jax.errors import UserError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    store = CheckpointStore(folder, keep=3)
    for step in (1, 2, 3):
        store.save(step, make_state(step), make_metadata(step))
    store.close()
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def assert_good_or_named(folder, what):
    """Whatever is restored is bit-identical to what was saved, and a step that is not is named."""
    restored = CheckpointStore(folder, keep=3).restore(abstract(make_state()))
    assert_identical(restored.state, make_state(restored.step))
    assert restored.metadata == make_metadata(restored.step)
    assert [damaged.step for damaged in restored.damaged] == ([] if restored.step == 3 else [3]), what
    assert all("\n" not in str(damaged) for damaged in restored.damaged)
    return restored


def test_a_flipped_bit_in_any_file_is_harmless_or_named(folder):
    for path in files(folder / "3"):
        content = path.read_bytes()
        for part in range(5):
            flip(path, 8 * (len(content) - 1) * part // 4 + part)
            assert_good_or_named(folder, path)
            path.write_bytes(content)


def test_a_flipped_bit_in_the_data_is_caught(folder):
    path = largest(folder / "3" / "state")
    flip(path, 4 * path.stat().st_size)
    assert assert_good_or_named(folder, path).step == 2


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_harmless_or_named(folder, share):
    for path in files(folder / "3"):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        assert_good_or_named(folder, path)
        path.write_bytes(content)


def test_a_missing_file_is_harmless_or_named(folder):
    for path in files(folder / "3"):
        content = path.read_bytes()
        path.unlink()
        assert_good_or_named(folder, path)
        path.write_bytes(content)


def test_an_altered_value_that_still_reads_is_caught_by_its_digest(folder):
    """The arrays of another step under the metadata of this one: every file is sound, the values are wrong."""
    shutil.rmtree(folder / "3" / "state")
    shutil.copytree(folder / "1" / "state", folder / "3" / "state")
    restored = assert_good_or_named(folder, "swapped")
    assert str(restored.damaged[0]).startswith("step 3 is damaged: the digest of array ")


def test_altered_metadata_is_caught_by_its_checksum(folder):
    path = folder / "3" / "sidecar" / "data.json"
    path.write_text(path.read_text().replace("pretrain", "pretrian"))
    restored = assert_good_or_named(folder, path)
    assert str(restored.damaged[0]) == "step 3 is damaged: the checksum of its metadata differs"
    assert read_metadata(str(folder)) == make_metadata(2)


def test_two_damaged_steps_are_passed_over(folder):
    for step in ("2", "3"):
        largest(folder / step / "state").unlink()
    restored = CheckpointStore(folder, keep=3).restore(abstract(make_state()))
    assert restored.step == 1
    assert [damaged.step for damaged in restored.damaged] == [3, 2]


def test_no_good_step_is_one_line_that_names_them_all(folder):
    for step in ("1", "2", "3"):
        (folder / step / "sidecar" / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"no good checkpoint in .*: step 3 is damaged: .*; step 1 is damaged") as error:
        CheckpointStore(folder, keep=3).restore(abstract(make_state()))
    assert "\n" not in str(error.value)


def test_a_damaged_step_that_was_asked_for_is_refused(folder):
    largest(folder / "3" / "state").unlink()
    with pytest.raises(UserError, match=r"no good checkpoint in .*: step 3 is damaged"):
        CheckpointStore(folder, keep=3).restore(abstract(make_state()), 3)


def test_a_half_written_folder_is_no_step_and_is_named_and_swept(folder):
    (folder / "3").rename(folder / "4.orbax-checkpoint-tmp")
    (folder / "notes").mkdir()
    store = CheckpointStore(folder, keep=3)
    assert store.steps() == [1, 2]
    restored = store.restore(abstract(make_state()))
    assert restored.step == 2
    assert [str(damaged) for damaged in restored.damaged] == ["step 4 is damaged: it was not finished"]
    store.save(3, make_state(3), make_metadata(3))
    store.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "notes"]


def test_a_half_deleted_step_is_no_step(folder):
    (folder / "3" / "commit_success.txt").unlink()
    assert CheckpointStore(folder, keep=3).steps() == [1, 2]
    delete(step_folder(folder, 3))
    assert not (folder / "3").exists()


def test_damaged_steps_do_not_count_among_those_kept(folder):
    for step in ("2", "3"):
        largest(folder / step / "state").unlink()
    store = CheckpointStore(folder, keep=1)
    store.restore(abstract(make_state()))
    store.save(2, make_state(2), make_metadata(2))
    assert 1 in store.steps()
    store.close()
    assert store.steps() == [2]
    assert_identical(store.restore(abstract(make_state())).state, make_state(2))


def test_an_old_step_with_damaged_metadata_is_not_deleted(folder):
    (folder / "1" / "sidecar" / "data.json").write_text("{")
    store = CheckpointStore(folder, keep=2)
    store.save(4, make_state(4), make_metadata(4))
    store.close()
    assert store.steps() == [1, 3, 4]


def test_a_lack_of_memory_is_not_taken_for_damage(folder, monkeypatch):
    def open_array(*_, **__):
        raise MemoryError

    monkeypatch.setattr(arrays, "_start", open_array)
    with pytest.raises(MemoryError):
        CheckpointStore(folder, keep=2).restore(abstract(make_state()))
