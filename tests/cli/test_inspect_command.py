import json
import shutil

import pytest

from looplm_jax.cli.main import main


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def damage(folder, step):
    """Truncates its arrays."""
    for path in (folder / "checkpoints" / str(step) / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-7])


def test_a_valid_run(trained, capsys):
    assert main(["inspect", str(trained)]) == 0
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if "valid" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["2", "4"]
    assert ["always" in row for row in rows] == [False, True]
    assert "recipe command: vocab_size=12, width=16" in printed.out
    assert "tokenizer symbols, sha256 " in printed.out
    assert printed.out.splitlines()[-1] == f"next: looplm evaluate {trained}"
    assert printed.err == ""


def test_json_of_one_step(trained, capsys):
    assert main(["inspect", str(trained / "checkpoints"), "--step", "2", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["step"], report["damage"], report["extra"]) == (2, None, {"stage": "only"})
    assert report["arrays"]["params.embedding"] == "float32[12,16]"


def test_a_damaged_step_is_named(copy, capsys):
    damage(copy, 4)
    assert main(["inspect", str(copy)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("looplm: step 4 is damaged: ")
    assert [word for word in ("damaged", "valid") if word in printed.out] == ["damaged", "valid"]
    assert main(["inspect", str(copy), "--json"]) == 2
    reports = json.loads(capsys.readouterr().out)
    assert [bool(report["damage"]) for report in reports] == [True, False]


@pytest.mark.parametrize("path", ["", "nowhere", "config.json", "tensorboard"])
def test_what_is_no_checkpoint(path, trained, tmp_path, capsys):
    given = str(trained / path) if path else str(tmp_path)
    assert main(["inspect", given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"looplm: {given} is not a checkpoint: expected a run folder")


def test_a_step_that_is_not_there(trained, capsys):
    assert main(["inspect", str(trained), "--step", "3"]) == 2
    assert capsys.readouterr().err == f"looplm: {trained} holds no step 3; it holds 2, 4\n"
