"""The benchmark of `looplm --help` on a single pair."""

from experiments.benchmarks import help_time


def test_a_pair_is_measured_and_printed(capsys):
    help_time.main(["--pairs", "1"])
    processor, medians, compared = capsys.readouterr().out.splitlines()
    assert processor.endswith(", medians of 1 pairs")
    assert medians.startswith("looplm --help ")
    assert float(compared.rpartition(" ")[2]) > 1
