import json
import math
import os

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from looplm_jax.training._metrics import EVALUATION, TRAIN, MetricsLog, read_metrics


def events(folder):
    """Returns the events of all files in the order of writing. A record is length, checksum, content, checksum."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def write_steps(folder, steps, *, resumed_at=0):
    log = MetricsLog(folder, step=resumed_at)
    for step in steps:
        log.write(TRAIN, step, {"loss": 1 / step, "loss_per_loop": [0.5, 0.25], "stage": "pretrain"})
    log.close()


def test_lines_and_events(tmp_path):
    write_steps(tmp_path, [1, 2])
    wanted = {"kind": "train", "step": 1, "loss": 1.0, "loss_per_loop": [0.5, 0.25], "stage": "pretrain"}
    assert read_metrics(tmp_path)[0] == wanted
    scalars = [
        {(event.step, value.tag): value.simple_value for value in event.summary.value}
        for event in events(tmp_path)
        if event.HasField("summary")
    ]
    assert scalars == [
        {(step, "train/loss"): 1 / step, (step, "train/loss_per_loop/1"): 0.5, (step, "train/loss_per_loop/2"): 0.25}
        for step in (1, 2)
    ]


def test_a_resumed_run_writes_again_what_came_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, [4, 5], resumed_at=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [1, 4]


def test_evaluations_before_the_checkpoint_are_known(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    for step in (2, 4):
        log.write(EVALUATION, step, {"loss_per_loop": [1.0]})
    log.close()
    log = MetricsLog(tmp_path, step=3)
    assert [log.evaluated(step) for step in (1, 2, 3, 4)] == [False, True, False, False]
    log.close()


def test_a_line_that_a_killed_process_left_incomplete_is_forgotten(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 3, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3], resumed_at=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("damaged", [b"nonsense", b"{}", b"null", b"[]", b"5", b"\xff\xfe", b"\0" * 40, b"[" * 100_000])
def test_a_damaged_line_costs_that_line_with_one_warning(damaged, tmp_path):
    path, warnings = tmp_path / "metrics.jsonl", []
    lines = [b'{"kind": "train", "step": %d}\n' % step for step in (1, 2, 3)]
    path.write_bytes(lines[0] + damaged + b"\n" + lines[1] + lines[2])
    MetricsLog(tmp_path, step=3, warn=warnings.append).close()
    assert warnings == [f"warning: {path}:2: not a line of metrics; left out"]
    assert path.read_bytes() == b"".join(lines)


def test_several_damaged_lines_are_one_warning(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{}\n[]\n\n{"kind": "train", "step": 2}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().err == f"looplm: warning: {path}:2, and 2 more: not a line of metrics; left out\n"


def test_what_is_not_finite_is_null_in_the_file_and_stays_in_the_events(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    log.write(TRAIN, 1, {"loss": math.nan, "loss_per_loop": [math.inf, 0.5]})
    log.close()
    wanted = {"kind": "train", "step": 1, "loss": None, "loss_per_loop": [None, 0.5]}
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == wanted
    [scalars] = [event.summary.value for event in events(tmp_path) if event.HasField("summary")]
    assert math.isnan(scalars[0].simple_value)
    assert scalars[1].simple_value == math.inf


def test_bare_nan_of_older_versions_is_read_and_written_again_as_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": NaN, "norm": Infinity}\n')
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])
    MetricsLog(tmp_path, step=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1, "loss": null, "norm": null}\n'


def test_a_flush_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    log = MetricsLog(tmp_path, step=0)
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    log.write(TRAIN, 1, {"loss": 1.0})
    assert synced == []
    log.flush()
    assert str(tmp_path / "metrics.jsonl") in synced
    log.close()


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []
