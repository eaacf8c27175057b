import tempfile

import pytest
from etils import epath

from looplm_jax.errors import UserError
from looplm_jax.training._profiling import ProfiledSteps, Profiler


@pytest.mark.parametrize(("text", "first", "last"), [("10:13", 10, 13), ("7", 7, 7)])
def test_steps_as_they_are_typed(text, first, last):
    assert ProfiledSteps.parse(text) == ProfiledSteps(first=first, last=last)


@pytest.mark.parametrize("text", ["", "0", "5:4", "a:b", "1:2:3", "-1"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="--profile-steps must be FIRST:LAST, such as 10:13, not"):
        ProfiledSteps.parse(text)


def test_the_steps_that_were_asked_for_leave_a_trace(tmp_path):
    profiler = Profiler(tmp_path / "profile", ProfiledSteps.parse("2:3"))
    for step in range(1, 6):
        profiler.before(step)
        assert bool(profiler.how_to_open()) == (step >= 2)
        profiler.after(step, ())
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    profiler.close()


def test_a_trace_without_a_temporary_folder_is_refused_and_does_not_end_the_run(monkeypatch):
    """In a bucket, a trace is first written to one."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/does/not/exist"])
    profiler = Profiler(epath.Path("gs://bucket/profile"), ProfiledSteps.parse("1:2"))
    profiler.before(1)
    profiler.after(2, ())
    profiler.close()
    assert profiler.how_to_open().startswith("no profile: No usable temporary directory found in ")


def test_nothing_is_traced_unless_asked_for(tmp_path):
    profiler = Profiler(tmp_path / "profile", None)
    profiler.before(1)
    profiler.after(1, ())
    assert profiler.how_to_open() is None
    assert not (tmp_path / "profile").exists()
