"""The cleaning benchmark at a small size."""

import pytest

from experiments.benchmarks import cleaning

pytest.importorskip("datasketch")


def test_every_figure_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(cleaning, "_corpus", lambda folder: [" ".join(f"word{i}" for i in range(1000))] * 3)
    cleaning.main(["--documents", "3000", "--items", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("n-grams of 5 items: ")
    assert lines[1].startswith("signatures: ")
    assert lines[2].startswith("300 of 3,000 documents dropped in ")
    assert lines[3].startswith("signatures 2 MB, beside them at most ")
