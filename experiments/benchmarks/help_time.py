"""Seconds until `looplm --help` has printed, beside a Python process that does nothing, in pairs that take turns.

python -m experiments.benchmarks.help_time [--pairs N]
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The statements of the installed script `looplm`.
_HELP = ("-c", "import sys; from looplm_jax.cli.main import main; sys.exit(main())", "--help")
_NOTHING = ("-c", "pass")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args(argv)

    # Reads the files once, so that the first pair is like the others.
    _seconds(_HELP)
    pairs = [(_seconds(_HELP), _seconds(_NOTHING)) for _ in range(options.pairs)]
    help_time, nothing = (statistics.median(times) for times in zip(*pairs, strict=True))
    difference = statistics.median(ours - theirs for ours, theirs in pairs)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)

    print(f"{_processor()}, medians of {len(pairs)} pairs")
    print(f"looplm --help {help_time:.3f} s, python -c pass {nothing:.3f} s")
    print(f"difference {difference:.3f} s, ratio {ratio:.1f}")


def _seconds(arguments: Sequence[str]) -> float:
    """Returns the seconds that a Python process takes from its start to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _processor() -> str:
    """Returns the name of the processor, as the operating system has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


if __name__ == "__main__":
    main()
