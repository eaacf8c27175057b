"""Damage is detected and named, and the latest valid step is used. An unreadable step is not called damaged."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from checkpoint_cases import abstract, assert_identical, make_metadata, make_state, step_folder

from looplm_jax import files as looplm_files
from looplm_jax.checkpoints import CheckpointStore, _arrays, inspect_steps, read_metadata
from looplm_jax.checkpoints._step import delete
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
    """Asserts that the restored step is bit-identical to the saved one, or that it is named as damaged."""
    restored = CheckpointStore(folder, keep=3).restore(abstract(make_state()))
    assert_identical(restored.state, make_state(restored.step))
    assert restored.metadata == make_metadata(restored.step)
    assert [damaged.step for damaged in restored.skipped] == ([] if restored.step == 3 else [3]), what
    assert all("\n" not in str(damaged) for damaged in restored.skipped)
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
    """The arrays of another step with the metadata of this one: every file is valid, but the values are wrong."""
    shutil.rmtree(folder / "3" / "state")
    shutil.copytree(folder / "1" / "state", folder / "3" / "state")
    restored = assert_good_or_named(folder, "swapped")
    assert str(restored.skipped[0]).startswith("step 3 is damaged: the digest of array ")


def test_altered_metadata_is_caught_by_its_checksum(folder):
    path = folder / "3" / "sidecar" / "data.json"
    path.write_text(path.read_text().replace("pretrain", "pretrian"))
    restored = assert_good_or_named(folder, path)
    assert str(restored.skipped[0]) == "step 3 is damaged: the checksum of its metadata differs"
    assert read_metadata(str(folder)) == make_metadata(2)


def test_two_damaged_steps_are_skipped(folder):
    for step in ("2", "3"):
        largest(folder / step / "state").unlink()
    restored = CheckpointStore(folder, keep=3).restore(abstract(make_state()))
    assert restored.step == 1
    assert [damaged.step for damaged in restored.skipped] == [3, 2]


def test_no_good_step_is_one_line_that_names_them_all(folder):
    for step in ("1", "2", "3"):
        (folder / step / "sidecar" / "data.json").write_text("{")
    with pytest.raises(
        UserError, match=r"no valid checkpoint in .*: step 3 is damaged: .*; step 1 is damaged"
    ) as error:
        CheckpointStore(folder, keep=3).restore(abstract(make_state()))
    assert "\n" not in str(error.value)


def test_a_damaged_step_that_was_asked_for_is_refused(folder):
    largest(folder / "3" / "state").unlink()
    with pytest.raises(UserError, match=r"no valid checkpoint in .*: step 3 is damaged"):
        CheckpointStore(folder, keep=3).restore(abstract(make_state()), 3)


def test_a_half_written_folder_is_no_step_and_is_named_and_swept(folder):
    (folder / "3").rename(folder / "4.orbax-checkpoint-tmp")
    (folder / "notes").mkdir()
    store = CheckpointStore(folder, keep=3)
    assert store.steps() == [1, 2]
    restored = store.restore(abstract(make_state()))
    assert restored.step == 2
    assert [str(damaged) for damaged in restored.skipped] == ["step 4 is damaged: it was not finished"]
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

    monkeypatch.setattr(_arrays, "_start", open_array)
    with pytest.raises(MemoryError):
        CheckpointStore(folder, keep=2).restore(abstract(make_state()))


def refuse(path):
    """Makes opening the file fail from now on, as on a damaged disk or when a file server is unreachable."""
    path.rename(path.with_name("hidden"))
    path.symlink_to(path)


def give_again(path):
    path.unlink()
    path.with_name("hidden").rename(path)


REFUSED = {
    "metadata": lambda step: step / "sidecar" / "data.json",
    "index": lambda step: step / "state" / "manifest.ocdbt",
    "arrays": lambda step: largest(step / "state"),
}


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(looplm_files, "WAITS", (0.0, 0.0))


@pytest.mark.parametrize("part", REFUSED)
def test_a_step_that_the_disk_refuses_is_neither_skipped_nor_deleted(folder, at_once, part):
    path = REFUSED[part](folder / "3")
    refuse(path)
    store = CheckpointStore(folder, keep=1)
    with pytest.raises(
        UserError, match=r"3: .* cannot be read \(Too many levels .*\); the step may be intact"
    ) as error:
        store.restore(abstract(make_state()))
    assert "\n" not in str(error.value)
    report = inspect_steps(str(folder), step=3)[0]
    assert report.damage is None
    assert report.problem.startswith("could not be checked: ")
    give_again(path)
    assert store.restore(abstract(make_state())).step == 3


@pytest.mark.parametrize("part", REFUSED)
def test_a_named_pipe_is_refused_at_once(folder, monkeypatch, part):
    path = REFUSED[part](folder / "3")
    path.rename(path.with_name("hidden"))
    os.mkfifo(path)
    monkeypatch.setattr(looplm_files.time, "sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))
    store = CheckpointStore(folder, keep=1)
    with pytest.raises(UserError, match=rf"{path} is a named pipe, not a file; .* the step may be intact"):
        store.restore(abstract(make_state()))
    report = inspect_steps(str(folder), step=3)[0]
    assert report.damage is None
    assert report.problem.startswith(f"could not be checked: {path} is a named pipe")
    give_again(path)
    assert store.restore(abstract(make_state())).step == 3


@pytest.mark.parametrize("part", REFUSED)
def test_a_refusal_that_passes_is_waited_for(folder, monkeypatch, part):
    path = REFUSED[part](folder / "3")
    refuse(path)
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            give_again(path)

    monkeypatch.setattr(looplm_files.time, "sleep", sleep)
    assert_good_or_named(folder, path)
    assert CheckpointStore(folder, keep=3).restore(abstract(make_state())).step == 3
    assert waited == list(looplm_files.WAITS[:2])


def test_a_mark_of_commit_that_the_disk_refuses_is_not_taken_for_missing(folder, at_once):
    """Otherwise the step would be deleted as an unfinished save."""
    refuse(folder / "3" / "commit_success.txt")
    store = CheckpointStore(folder, keep=3)
    with pytest.raises(OSError, match="Too many levels"):
        store.steps()
    with pytest.raises(UserError, match="Too many levels"):
        store.save(4, make_state(4), make_metadata(4))
    give_again(folder / "3" / "commit_success.txt")
    assert store.steps() == [1, 2, 3]


def test_an_old_step_that_the_disk_refuses_is_not_deleted(folder, at_once):
    refuse(folder / "1" / "sidecar" / "data.json")
    store = CheckpointStore(folder, keep=2)
    store.save(4, make_state(4), make_metadata(4))
    store.close()
    assert store.steps() == [1, 3, 4]


def revise(step, edit):
    """Changes fields of the metadata of a step and its checksum, as another version might write them."""
    path = step / "sidecar" / "data.json"
    body = json.loads(json.loads(path.read_text())["body"])
    edit(body)
    text = json.dumps(body)
    path.write_text(json.dumps({"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def first_array(body):
    return next(iter(body["arrays"].values()))


OTHER_VERSIONS = {
    r"\(format 2; this version reads format 1\)": lambda body: body.update(format=2),
    r"\(format '1'; ": lambda body: body.update(format="1"),
    "unknown field 'newer'": lambda body: body.update(newer=1),
    "no field 'permanent'": lambda body: body.pop("permanent"),
    "field 'extra' has another type": lambda body: body.update(extra=None),
    "field 'config' has another type": lambda body: body.update(config=[]),
    "'data_state' is empty": lambda body: body.update(data_state=[]),
    "'extra.stage' has another type": lambda body: body["extra"].update(stage=1),
    "'tokenizer' is not base64": lambda body: body.update(tokenizer="é"),
    "unknown field 'unit' of array ": lambda body: first_array(body).update(unit="m"),
    "no field 'digest' of array ": lambda body: first_array(body).pop("digest"),
    "unknown dtype 'float6' of array ": lambda body: first_array(body).update(dtype="float6"),
    "no shape is 'shape' of array ": lambda body: first_array(body).update(shape=[-1]),
}


@pytest.mark.parametrize("why", OTHER_VERSIONS)
def test_a_step_of_another_version_is_named_as_such_and_the_one_before_is_used(folder, why):
    revise(folder / "3", OTHER_VERSIONS[why])
    skipped = assert_good_or_named(folder, why).skipped
    assert skipped[0].other_version
    with pytest.raises(UserError, match=f"step 3 was written by another version of looplm_jax .*{why}.*install the"):
        CheckpointStore(folder, keep=3).restore(abstract(make_state()), 3)
    assert inspect_steps(str(folder), step=3)[0].problem.startswith("was written by another version")


def test_a_step_of_another_version_is_never_deleted(folder):
    revise(folder / "3", OTHER_VERSIONS["unknown field 'newer'"])
    (folder / "3" / "kept").touch()
    store = CheckpointStore(folder, keep=1)
    store.restore(abstract(make_state()))
    store.save(3, make_state(3), make_metadata(3))
    store.save(4, make_state(4), make_metadata(4))
    store.close()
    assert (folder / "3.set-aside-1" / "kept").exists()
    assert store.steps() == [4]


def test_a_step_from_before_formats_were_named_is_read(folder):
    revise(folder / "3", lambda body: body.pop("format"))
    assert assert_good_or_named(folder, "no format").step == 3


@pytest.mark.parametrize("change", ["deleted as old", "rewritten", "swept"])
def test_a_step_that_is_a_link_is_never_written_or_deleted_through(pristine, folder, tmp_path, change):
    other = shutil.copytree(pristine, tmp_path / "other")
    if change == "rewritten":
        revise(other / "3", OTHER_VERSIONS["unknown field 'newer'"])
        (other / "3" / "state" / "manifest.ocdbt").unlink()
    if change == "swept":
        (other / "3" / "commit_success.txt").unlink()
    before = {path: path.read_bytes() for path in files(other)}
    number = "1" if change == "deleted as old" else "3"
    shutil.rmtree(folder / number)
    (folder / number).symlink_to(other / number)
    store = CheckpointStore(folder, keep=1)
    assert store.restore(abstract(make_state())).step == (3 if change == "deleted as old" else 2)
    step = 4 if change == "deleted as old" else 3
    store.save(step, make_state(step), make_metadata(step))
    store.close()
    assert {path: path.read_bytes() for path in files(other)} == before
    assert store.steps() == [step]
    assert not (folder / str(step)).is_symlink()


def test_a_link_that_leads_nowhere_is_no_step_and_gives_way(folder, tmp_path):
    (folder / "4").symlink_to(tmp_path / "gone")
    store = CheckpointStore(folder, keep=3)
    store.save(4, make_state(4), make_metadata(4))
    store.close()
    assert_identical(store.restore(abstract(make_state()), 4).state, make_state(4))
    assert not (tmp_path / "gone").exists()


def test_a_platform_that_is_not_here_is_not_taken_for_damage(folder):
    program = f"from looplm_jax.checkpoints import inspect_steps; inspect_steps({str(folder)!r})"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    message = ended.stderr.splitlines()[-1]  # the lines before it quote source code
    assert message.startswith("looplm_jax.errors.UserError: JAX cannot use the platform 'cuda' here")
    assert "damaged" not in message
