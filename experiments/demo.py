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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from looplm_jax.cli.main import main as looplm
from looplm_jax.config import Recipe
from looplm_jax.errors import UserError
from looplm_jax.evaluation import Curve, DepthSweep, Table, plot_depths, plot_exits
from looplm_jax.files import quoted
from looplm_jax.models import count_params

# The report


_COLUMNS = 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """A prompt, the tokens of its continuation, and the loops of each."""

    prompt: str
    pieces: Sequence[str]
    exit_loops: Sequence[int]


def write_report(
    out: Path,
    recipe: Recipe,
    seconds: Mapping[str, float],
    commands: Mapping[str, str],
    generated: Sequence[Generated],
) -> list[str]:
    """Writes `report.md` and its figures from the evaluations in `out`. Returns the names of the files."""
    evaluations = {
        name: json.loads((out / "evaluation" / name / "evaluation.json").read_text())
        for name in ("stage1", "stage2", "one-loop")
    }

    figures = _figures(out, evaluations)
    sections = [
        _title(recipe),
        _depths(evaluations),
        _exits(evaluations),
        *(f"![{name}]({name})\n" for name in figures),
        _generations(generated),
        _parts(seconds, commands),
    ]

    (out / "report.md").write_text("\n".join(sections), encoding="utf-8")
    return ["report.md", *figures]


# Sections


def _title(recipe: Recipe) -> str:
    """Returns the heading and a summary of the model and its training."""
    stages = "; ".join(
        f"{stage.name}: {stage.steps} steps of {stage.batch_size} x {stage.sequence_length} tokens, {stage.loops} loops"
        for stage in recipe.stages
    )
    return (
        f"# A looped language model, end to end\n\nLayers: {recipe.model.num_layers}, of width {recipe.model.width}; "
        f"{count_params(recipe.model):,} parameters, {recipe.model.vocab_size} tokens in the vocabulary. {stages}. "
        "All numbers are on held-out files of the standard library.\n"
    )


def _depths(evaluations: Mapping[str, Any]) -> str:
    """Returns the section with the loss at every depth."""
    looped, one_loop = evaluations["stage2"]["depths"], evaluations["one-loop"]["depths"]
    rows = [
        [f"{loops:.0f}", f"{loss:.4f}", f"{accuracy:.2%}", "trained depth" if loops == looped["trained_loops"] else ""]
        for loops, loss, accuracy in zip(looped["loops"], looped["loss"], looped["accuracy"], strict=True)
    ]

    rows.append(["no loops", f"{one_loop['loss'][0]:.4f}", f"{one_loop['accuracy'][0]:.2%}", "trained with T = 1"])

    columns = ("loops", "loss (nats/token)", "accuracy", "")
    table = Table(title="depth", columns=columns, rows=rows, marked=looped["trained_loops"] - 1).markdown()
    return f"## Loss at every depth, {looped['tokens']:,} held-out tokens\n\n{table}\n{_verdict(looped, one_loop)}\n"


def _verdict(looped: Mapping[str, Any], one_loop: Mapping[str, Any]) -> str:
    """Returns the comparison of the trained depth with one loop and with the twin without loops."""
    trained = looped["trained_loops"]
    first, deep, plain = looped["loss"][0], looped["loss"][trained - 1], one_loop["loss"][0]
    return (
        f"At T = {trained} the loss is {_against(deep, first)} that at T = 1, and {_against(deep, plain)} that of the "
        "same layers trained without loops (equal parameters, equal tokens)."
    )


def _against(loss: float, other: float) -> str:
    """Returns the difference of two losses in words."""
    return f"{abs(loss - other):.4f} nats {'below' if loss < other else 'above'}"


def _exits(evaluations: Mapping[str, Any]) -> str:
    """Returns the section about early exit before and after Stage II."""
    before, after = (evaluations[name]["exits"] for name in ("stage1", "stage2"))
    rows = [
        [f"q={q:g}", f"{l0:.2f}", f"{x0:.4f}", f"{l1:.2f}", f"{x1:.4f}"]
        for q, l0, x0, l1, x1 in zip(
            after["q_exit"]["q"],
            before["q_exit"]["loops"],
            before["q_exit"]["loss"],
            after["q_exit"]["loops"],
            after["q_exit"]["loss"],
            strict=True,
        )
    ]

    columns = ("exit", "mean loops, Stage I", "loss, Stage I", "mean loops, Stage II", "loss, Stage II")
    table = Table(title="exits", columns=columns, rows=rows).markdown()

    areas = (
        "Mean loss over all budgets (area under the curve divided by its span): "
        f"fixed depth {after['fixed']['area']:.4f}, "
        f"Stage I gate {before['q_exit']['area']:.4f}, Stage II gate {after['q_exit']['area']:.4f}. Lower is better."
    )
    return f"## Early exit before and after Stage II\n\n{table}\n{areas}\n"


# Figures


def _figures(out: Path, evaluations: Mapping[str, Any]) -> list[str]:
    """Draws the figures. Returns their names, or none if matplotlib is not installed."""
    try:
        one_loop = _sweep(evaluations["one-loop"], deepest=1)
        plot_depths({"looped": _sweep(evaluations["stage2"]), "without loops": one_loop}, out / "depth.png")
        plot_exits(
            {
                "fixed depth": _curve(evaluations["stage2"]["exits"]["fixed"]),
                "Q-exit, Stage I gate": _curve(evaluations["stage1"]["exits"]["q_exit"]),
                "Q-exit, Stage II gate": _curve(evaluations["stage2"]["exits"]["q_exit"]),
            },
            out / "exit.png",
        )
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return []
    return ["depth.png", "exit.png", "looped/training.png"]


def _sweep(evaluation: Mapping[str, Any], *, deepest: int | None = None) -> DepthSweep:
    """Returns the sweep of an evaluation, optionally only its first depths."""
    depths = evaluation["depths"]
    curve = _curve(depths, deepest=deepest)
    return DepthSweep(curve=curve, trained_loops=depths["trained_loops"], tokens=depths["tokens"])


def _curve(values: Mapping[str, Any], *, deepest: int | None = None) -> Curve:
    """Returns the curve of stored points, optionally only the first ones."""
    return Curve.of(*(values[name][:deepest] for name in ("loops", "loss", "accuracy")))


# Generated text and timings


def _generations(generated: Sequence[Generated]) -> str:
    """Returns the section with generated text."""
    blocks = [f"```\n{_aligned(sample)}\n```\n" for sample in generated]
    return "\n".join(["## Text by Q-exit, with the loops of each token below it\n", *blocks])


def _aligned(sample: Generated) -> str:
    """Returns the prompt, followed by lines of tokens with their loops underneath."""
    shown = [piece.replace("\n", "⏎").replace("\t", "⇥") for piece in sample.pieces]
    lines = [sample.prompt.replace("\n", "⏎")]

    tokens = counts = ""

    for piece, loops in zip(shown, sample.exit_loops, strict=True):
        # A new line never splits a token from its number of loops.
        if len(tokens) + len(piece) > _COLUMNS:
            lines += [tokens, counts]
            tokens = counts = ""
        tokens += piece
        # Aligned with the start of the token above.
        counts += str(loops).ljust(len(piece))

    return "\n".join([*lines, tokens, counts])


def _parts(seconds: Mapping[str, float], commands: Mapping[str, str]) -> str:
    """Returns the section with the time and command of every part."""
    rows = [[name, f"{seconds[name]:.0f} s", f"`{' '.join(command.split())}`"] for name, command in commands.items()]
    table = Table(title="parts", columns=("part", "wall time", "command"), rows=rows).markdown()
    total = sum(seconds.values())
    return f"## Parts\n\n{table}\n{total:.0f} s in all, the start of Python not counted.\n"


# The parts


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
            print(f"demo: stopped in {name!r}; the same command resumes there", file=sys.stderr)
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
