import pytest

from looplm_jax.training._goodput import Activity, ActivityTimer, shares, time_summary, time_warnings, total_seconds


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self):
        return self.now


def test_every_second_is_charged_once():
    clock = Clock()
    watch = ActivityTimer(clock)
    for seconds, activity in ((3, Activity.COMPILE), (5, Activity.STEP), (1, Activity.INPUT), (4, Activity.STEP)):
        clock.now += seconds
        watch.charge(activity)
    assert sum(watch.total().values()) == clock.now - 100
    assert watch.total()[Activity.STEP] == 9


def test_lines_of_the_metrics_add_up_to_the_total():
    clock = Clock()
    watch = ActivityTimer(clock)
    rows = []
    for seconds in (2.5, 0.25, 7.0):
        clock.now += seconds
        watch.charge(Activity.SAVE)
        rows.append({"kind": "train", **watch.read_out()})
    assert total_seconds([*rows, {"kind": "evaluation"}]) == watch.total()
    assert rows[1]["seconds_in_save"] == 0.25


def seconds(**given):
    return {activity: given.get(activity.value, 0.0) for activity in Activity}


def test_shares_sum_to_one():
    assert sum(shares(seconds(step=7.0, save=2.0, other=1.0)).values()) == pytest.approx(1)
    assert shares(seconds()) == {}


def test_the_summary_names_what_took_time():
    assert time_summary(seconds(step=567.0, compile=63.0)) == "time 10:30: step 90.0%, compile 10.0%"


@pytest.mark.parametrize(
    ("activity", "words"), [("input", "waiting for input"), ("save", "saving"), ("compile", "compiling")]
)
def test_a_twentieth_is_worth_a_warning(activity, words):
    (warning,) = time_warnings(seconds(step=949.0, **{activity: 51.0}))
    assert warning.startswith(f"5% of the time went into {words}: ")
    assert time_warnings(seconds(step=951.0, **{activity: 49.0})) == []


def test_a_short_run_is_not_warned():
    assert time_warnings(seconds(step=1.0, compile=99.0)) == []
