"""Checkpoints can be saved and restored under every valid file name, or are refused before anything is written."""

import os

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import make_metadata
from gcs_emulator import bucket, gcs  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.checkpoints import CheckpointStore, inspect_steps
from looplm_jax.checkpoints._paths import checkpoint_path, kvstore
from looplm_jax.checkpoints._raw import RawStep, read_raw, write_raw
from looplm_jax.errors import UserError

ODD = ["try#2", "lr[3]", "a*?", "10% x%2Fy", "a|b", "ünï 😀", "new\nline", "~", "{a,b}::c", "gs:x", "-'\"$HOME"]
STATE = {"a": jnp.arange(4.0)}
ABSTRACT = {"a": jax.ShapeDtypeStruct((4,), jnp.float32)}


def save(folder, step=1, scale=1.0):
    store = CheckpointStore(folder, keep=3)
    store.save(step, {"a": scale * STATE["a"]}, make_metadata())
    store.close()


@pytest.mark.parametrize("name", ODD)
def test_what_was_saved_under_any_name_is_read_back(tmp_path, name):
    save(tmp_path / name / "checkpoints")
    restored = CheckpointStore(tmp_path / name / "checkpoints", keep=2).restore(ABSTRACT)
    assert restored.state["a"].tolist() == STATE["a"].tolist()
    assert [report.problem for report in inspect_steps(str(tmp_path / name))] == [None]


@pytest.mark.parametrize("name", ["a[b]", "a?b", "a*"])
def test_a_name_is_no_pattern_for_those_of_other_runs(tmp_path, name):
    save(tmp_path / "ab" / "checkpoints", scale=2.0)
    (tmp_path / "axb").mkdir()
    save(tmp_path / name / "checkpoints")
    restored = CheckpointStore(tmp_path / name / "checkpoints", keep=2).restore(ABSTRACT)
    assert restored.state["a"].tolist() == STATE["a"].tolist()


def test_a_whole_step_is_written_and_read_below_an_odd_name(tmp_path):
    write_raw(tmp_path / "x#[1]", RawStep(step=5, arrays=STATE, metadata=make_metadata()))
    assert read_raw(tmp_path / "x#[1]").arrays["a"].tolist() == STATE["a"].tolist()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("back\\slash", "has a backslash in its name, which TensorStore reads as a slash"),
        ("gs:/x", "has 'gs:/' in it, which Orbax reads as the name of a bucket"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_a_name_that_cannot_be_kept_is_refused_before_anything_is_written(tmp_path, name, why):
    with pytest.raises(UserError) as error:
        CheckpointStore(tmp_path / name, keep=2)
    assert f" {why}, so no checkpoint can be kept there; rename the folder" in str(error.value)
    str(error.value).encode()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["a#b", "a?b", "a*b", "a[1]", "a\\b", "a\nb", "a+b", "a;b"])
def test_a_name_in_a_bucket_that_tools_misread_is_refused(name):
    pytest.importorskip("gcsfs")
    with pytest.raises(UserError, match=r"in its name, which tools for buckets misread; rename it"):
        checkpoint_path(f"gs://bucket/{name}/checkpoints")


def test_a_folder_called_gs_is_no_bucket():
    folder = checkpoint_path("/gs/mounted/run")
    assert os.fspath(folder / "checkpoints") == "/gs/mounted/run/checkpoints"
    assert kvstore(folder)["driver"] == "file"
    assert not folder.exists()  # on the disk, not in a cache


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/\\"), min_size=1))
def test_tensorstore_is_given_every_name_as_it_is(name):
    if name not in (".", "..") and not name.endswith("gs:"):
        assert kvstore(checkpoint_path(f"/tmp/{name}")) == {"driver": "file", "path": f"/tmp/{name}/"}


@pytest.mark.parametrize("name", [pytest.param("10% x%2Fy", marks=pytest.mark.slow), "10% x%2Fy a|b ünï 😀 {a,b}"])
def test_what_was_saved_in_a_bucket_under_any_name_that_is_taken_is_read_back(bucket, name):  # noqa: F811
    save(f"{bucket}/{name}/checkpoints")
    save(f"{bucket}/{name}/checkpoints", step=2)
    restored = CheckpointStore(f"{bucket}/{name}/checkpoints", keep=2).restore(ABSTRACT)
    assert (restored.step, restored.state["a"].tolist()) == (2, STATE["a"].tolist())
