"""Seconds from `looplm generate` to its first token: without compiled programs, and with those of an earlier command.

    python -m experiments.benchmarks.start_up [--checkpoint RUN --prompt TEXT]

Each round has an empty folder for compiled programs and starts the command twice. Without `--checkpoint`, a small run
is trained first. Two more starts show how the time is spent: `import` is the time until the modules are loaded, `load`
reads the checkpoint and includes what it compiles, `trace` traces and lowers programs, `compile` compiles them, or
reads compiled ones. Parts of `trace` and `compile` are included in `load`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from looplm_jax.codec import to_dict
from looplm_jax.config import CheckpointConfig, DataConfig, EvaluationConfig, MeshConfig, Recipe, SourceConfig, Stage
from looplm_jax.data.tasks import make_task
from looplm_jax.models import presets

_TASK = "mano"
_SHARES = """
import collections, json, sys, time
from looplm_jax.cli._compilation_cache import keep_compiled_programs
keep_compiled_programs()
started = time.perf_counter()
import jax
from looplm_jax.cli import generate
from looplm_jax.cli.main import main

seconds = collections.Counter({"import": time.perf_counter() - started})
KINDS = {"jaxpr_trace": "trace", "jaxpr_to_mlir_module": "trace", "backend_compile": "compile"}

def count(event, duration, **_):
    if kind := KINDS.get(event.rpartition("/")[2].removesuffix("_duration")):
        seconds[kind] += duration

def timed(*arguments, **options):
    before = time.perf_counter()
    loaded = load(*arguments, **options)
    seconds["load"] += time.perf_counter() - before
    return loaded

jax.monitoring.register_event_duration_secs_listener(count)
load, generate.load = generate.load, timed
main(sys.argv[1:])
print(json.dumps(seconds), file=sys.stderr)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a run folder (default: train a small one)")
    parser.add_argument("--prompt", default="<len_3> +", help="in the vocabulary of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint or _train(Path(scratch))
        arguments = ["generate", checkpoint, f"--prompt={options.prompt}", "--max-new-tokens=8"]

        pairs = []
        for number in range(options.rounds):
            # An empty cache: the first start compiles, the second one reads its programs.
            environment = _environment(Path(scratch) / f"cache-{number}")
            pairs.append((_first_token(arguments, environment), _first_token(arguments, environment)))
            print(f"first {pairs[-1][0]:.2f} s, second {pairs[-1][1]:.2f} s", flush=True)
        print(f"ratio, median of {len(pairs)} pairs: {statistics.median(again / new for new, again in pairs):.2f}")

        environment = _environment(Path(scratch) / "cache-of-shares")
        for name in ("first", "second"):
            print(f"{name}: " + ", ".join(f"{kind} {spent:.2f} s" for kind, spent in _shares(arguments, environment)))


def _train(folder: Path) -> str:
    """Trains for one step. Returns the run folder."""
    model = presets.small(vocab_size=make_task(_TASK).tokenizer.vocab_size)
    recipe = Recipe(
        name="start-up",
        model=model,
        stages=(Stage(name="only", steps=1, batch_size=1, sequence_length=32, loops=1),),
        mesh=MeshConfig(data=1),
        data=DataConfig(sources=(SourceConfig(path=_TASK),)),
        checkpoint=CheckpointConfig(every=1, keep=1),
        evaluation=EvaluationConfig(sequences=1),
    )

    file = folder / "recipe.json"
    file.write_text(json.dumps(to_dict(recipe)))
    command = [sys.executable, "-m", "looplm_jax.cli.main", "train", f"--recipe={file}", f"--out={folder / 'run'}"]
    subprocess.run(command, check=True, capture_output=True, env=_environment(folder / "cache-of-training"))
    return str(folder / "run")


def _environment(cache: Path) -> dict[str, str]:
    """Returns the environment with its own compilation cache, and without the user's cache settings."""
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return {**kept, "XDG_CACHE_HOME": str(cache)}


def _first_token(arguments: Sequence[str], environment: dict[str, str]) -> float:
    """Returns the seconds until the command prints its first byte."""
    command = [sys.executable, "-m", "looplm_jax.cli.main", *arguments]
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise RuntimeError("looplm generate gave no text")
        seconds = time.perf_counter() - started
        process.stdout.read()
    return seconds


def _shares(arguments: Sequence[str], environment: dict[str, str]) -> list[tuple[str, float]]:
    """Returns the seconds of each phase, by name."""
    command = [sys.executable, "-c", _SHARES, *arguments]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return sorted(json.loads(done.stderr.splitlines()[-1]).items())


if __name__ == "__main__":
    main()
