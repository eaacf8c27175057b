"""The complete demo at a small size: every part, the report, and resuming after a stop."""

import json
from pathlib import Path

import pytest

from experiments import demo

SMALL = {
    "model.width": "32",
    "model.mlp_width": "48",
    "model.vocab_size": "384",
    "stages.pretrain.steps": "6",
    "stage.warmup_steps": "1",
    "stages.pretrain.decay_steps": "2",
    "stages.gate.steps": "3",
    "stage.batch_size": "2",
    "mesh.data": "1",
    "stage.sequence_length": "64",
    "evaluation.every": "0",
    "evaluation.sequences": "4",
    "data.validation_fraction": "0.3",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a demo folder with an existing small corpus."""
    out = tmp_path / "demo"
    out.mkdir()
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    lines = [{"text": part} for path in sources for part in path.read_text().split("\n\n") if part.strip()]
    (out / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def run(folder: Path) -> int:
    return demo.main(["--out", str(folder), *(word for item in SMALL.items() for word in ("--set", *item))])


@pytest.mark.slow
def test_the_demo_runs_to_its_report_and_a_second_time_does_nothing_again(folder, capsys):
    assert run(folder) == 0
    assert "next: looplm generate" in capsys.readouterr().out
    report = (folder / "report.md").read_text()
    for part in ("every depth", "before and after Stage II", "without loops", "loops of each token", "wall time"):
        assert part in report
    assert (folder / "depth.png").stat().st_size > 10_000
    assert (folder / "exit.png").stat().st_size > 10_000
    depths = json.loads((folder / "evaluation" / "stage2" / "evaluation.json").read_text())["depths"]
    assert depths["loops"] == [1, 2, 3, 4, 5, 6, 7, 8]

    metrics = (folder / "looped" / "metrics.jsonl").read_text()
    assert run(folder) == 0
    assert (folder / "looped" / "metrics.jsonl").read_text() == metrics
    assert "compiling stage" not in capsys.readouterr().err


def test_a_part_that_fails_stops_the_demo_with_its_status(folder, capsys):
    (folder / "corpus.jsonl").write_text("not json\n")
    assert run(folder) == 2
    error = capsys.readouterr().err
    assert "corpus.jsonl:1" in error
    assert "the same command resumes" in error
