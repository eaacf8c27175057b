"""The checkpoint benchmark on a small state: it saves, restores and leaves no files."""

import pytest

from experiments.benchmarks import checkpoints


@pytest.mark.slow
def test_a_state_is_saved_and_restored_and_nothing_stays(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "_STEPS", 1)
    folder = tmp_path / "work"
    checkpoints.main(["--folder", str(folder), "--megabytes", "1", "--rounds", "1"])
    bandwidth, stall = capsys.readouterr().out.split("\n\n")
    assert bandwidth.splitlines()[-1].count(" MB/s |") == 4
    assert stall.splitlines()[-1].count(" s |") == 6
    assert not folder.exists()


def test_a_folder_that_is_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        checkpoints.main(["--folder", str(tmp_path)])
    assert "--folder must name a folder that does not exist" in capsys.readouterr().err


def test_the_stall_is_what_a_save_adds_to_all_steps():
    a_round = checkpoints.Round(
        write=1, read=1, step=2.0, save=9, restore=1, call=0.5, first=3.0, during=2.5, behind=4, stored=1
    )
    assert a_round.stall == 0.5 + 1.0 + 3 * 0.5
    measured = checkpoints.Measured(state_bytes=10**9, rounds=(a_round, a_round))
    assert checkpoints.stall_table([measured]).splitlines()[-1] == (
        "| 1,000 MB | 2.00 s | 0.50 s | 3.00 s | 2.50 s | 4 | 3.00 s | 9.00 s |"
    )
