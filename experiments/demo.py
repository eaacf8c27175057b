"""An end-to-end demonstration on two CPU cores in at most ten minutes: `make demo` runs it.

    python -m experiments.demo --out runs/demo

Collects the source of the local Python's standard library, trains a tokenizer, pre-trains a small looped model with
Stage I, trains its gate with Stage II, pre-trains the same layers without loops on the same tokens, evaluates every
depth from 1 to twice the trained one, draws the exit curves before and after Stage II, and generates text with Q-exit.

Every part is a `looplm` command; `report.md` lists it with the time it took. Finished parts are skipped, so the same
command resumes where it stopped.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.demo_report import Generated, write_report
from looplm_jax.cli.main import main as looplm
from looplm_jax.config import Recipe
from looplm_jax.files import quoted

PROMPTS = ("def __init__(self, ", "import os\nimport sys\n", "class Error(Exception):\n")
_NEW_TOKENS = 48
_Q = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the unfinished parts, writes the report, and prints which command to run next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo (default: runs/demo)")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="override a field"
    )
    arguments = parser.parse_args(argv)

    # As flags of `looplm train`.
    overrides = [word for field, value in arguments.set for word in (f"--{field}", value)]
    parts = _Parts(out=arguments.out, overrides=overrides)
    for name, part in parts.all().items():
        status = parts.run(name, part)
        if status:
            print(f"demo: stopped in {name!r}; the same command goes on from there", file=sys.stderr)
            return status

    generated = [parts.generated(prompt) for prompt in PROMPTS]
    written = write_report(parts.out, parts.recipe(), parts.seconds(), parts.commands, generated)
    print(f"\nwrote {', '.join(written)} to {parts.out}; the whole took {sum(parts.seconds().values()):.0f} s")
    print(f"next: looplm generate {quoted(parts.looped)} --prompt 'def ' --exit q=0.9 --temperature 0.8")
    print("      looplm train --recipe text-small --data 'mine/*.jsonl'")
    return 0


@dataclasses.dataclass
class _Parts:
    """The parts of the demo in order, the commands they ran, and the seconds they took."""

    out: Path
    overrides: list[str]
    commands: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def looped(self) -> Path:
        """Returns the run folder of the looped model."""
        return self.out / "looped"

    @property
    def one_loop(self) -> Path:
        """Returns the run folder of its twin without loops."""
        return self.out / "one-loop"

    def recipe(self) -> Recipe:
        """Returns the recipe that ran, including overrides."""
        from looplm_jax.training._run_folder import read_recipe

        return read_recipe(self.looped / "config.json")

    def all(self) -> dict[str, Callable[[str], int]]:
        """Returns every part under its name in the report."""
        return {
            "corpus": self._corpus,
            "tokenizer, Stage I and Stage II": self._train_looped,
            "the same layers without loops": self._train_one_loop,
            "evaluation after Stage I": lambda name: self._evaluate(
                name, self.looped, "stage1", step=self._stage1_steps()
            ),
            "evaluation after Stage II": lambda name: self._evaluate(name, self.looped, "stage2"),
            "evaluation without loops": lambda name: self._evaluate(name, self.one_loop, "one-loop"),
            "generation": self._generate,
        }

    def run(self, name: str, part: Callable[[str], int]) -> int:
        """Runs one part, and adds its time to that of earlier attempts."""
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        # Parts run in this process, through the entry point of the command line.
        status = part(name)
        seconds = {**self.seconds(), name: self.seconds().get(name, 0.0) + time.monotonic() - start}
        self._timings.write_text(json.dumps(seconds, indent=2))
        return status

    def seconds(self) -> dict[str, float]:
        """Returns the wall time of every part so far."""
        return json.loads(self._timings.read_text()) if self._timings.exists() else {}

    def generated(self, prompt: str) -> Generated:
        """Returns the model's continuation of a prompt, token by token with the loops of each."""
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            looplm([*self._generate_words(prompt), "--json"])
        values = json.loads(text.getvalue())
        return Generated(prompt=prompt, pieces=values["pieces"], exit_loops=values["exit_loops"])

    @property
    def _timings(self) -> Path:
        """Returns the file with the times of the parts."""
        return self.out / "timings.json"

    def _corpus(self, name: str) -> int:
        """Collects the corpus, unless it exists."""
        self.commands[name] = "python -c \"from looplm_jax.data import collect_stdlib; collect_stdlib('corpus.jsonl')\""
        self.out.mkdir(parents=True, exist_ok=True)
        corpus = self.out / "corpus.jsonl"
        if not corpus.exists():
            from looplm_jax.data import collect_stdlib

            summary = collect_stdlib(corpus)
            print(f"{summary.documents} files, {summary.characters:,} characters of the standard library")
        return 0

    def _train_looped(self, name: str) -> int:
        """Trains the looped model through both stages."""
        words = ["train", "--recipe", "demo", "--data", f"{self.out}/corpus.jsonl", "--out", str(self.looped)]
        return self._looplm(name, [*words, *self.overrides])

    def _train_one_loop(self, name: str) -> int:
        """Trains the twin without loops, which has no gate to train and shares the tokenizer."""
        words = [
            "train",
            "--recipe",
            "demo-one-loop",
            "--data",
            f"{self.out}/corpus.jsonl",
            "--out",
            str(self.one_loop),
        ]

        shared = ["--tokenizer", f"{self.looped}/tokenizer.model"]
        overrides = [word for pair in self._pairs() if not pair[0].startswith("--stages.gate") for word in pair]
        return self._looplm(name, [*words, *shared, *overrides])

    def _evaluate(self, name: str, run: Path, label: str, *, step: int | None = None) -> int:
        """Evaluates one step of a run, unless that was done."""
        out = self.out / "evaluation" / label
        words = ["evaluate", str(run), "--out", str(out)] + ([] if step is None else ["--step", str(step)])
        # Written last, so it marks a finished evaluation.
        if (out / "evaluation.json").exists():
            self.commands[name] = shlex.join(["looplm", *words])
            return 0
        return self._looplm(name, words)

    def _generate(self, name: str) -> int:
        """Generates text for every prompt."""
        statuses = [self._looplm(name, self._generate_words(prompt)) for prompt in PROMPTS]
        # 0 if all succeeded.
        return max(statuses)

    def _generate_words(self, prompt: str) -> list[str]:
        """Returns the command that continues a prompt."""
        words = ["generate", str(self.looped), "--prompt", prompt, "--exit", f"q={_Q}"]
        return [*words, "--max-new-tokens", str(_NEW_TOKENS), "--temperature", "0.7", "--top-p", "0.9"]

    def _looplm(self, name: str, words: list[str]) -> int:
        """Records and runs a `looplm` command."""
        self.commands[name] = shlex.join(["looplm", *words])
        return looplm(words)

    def _pairs(self) -> list[tuple[str, str]]:
        """Returns the overrides as pairs of a flag and its value."""
        return list(zip(self.overrides[::2], self.overrides[1::2], strict=True))

    def _stage1_steps(self) -> int:
        """Returns the step at which Stage I ends."""
        return self.recipe().stages[0].steps


if __name__ == "__main__":
    sys.exit(main())
