"""Speed of the input pipeline: tokens per second of three ways to read, and how long a real run waits for them.

The text is the source of this Python's standard library. It is read (a) as JSONL, tokenized and packed on the fly, (b)
as one prepared corpus, (c) as a mixture of 30 prepared corpora. A small recipe is then trained on each. The last column
compares with the needs of one host of ouro-1.4b on v5e:16x16: 4,194,304 tokens per step over 64 hosts, at 8.037 s.

    python -m experiments.benchmarks.input_pipeline
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from looplm_jax import data
from looplm_jax.codec import to_dict
from looplm_jax.config import DataConfig, EvaluationConfig, Recipe, SourceConfig
from looplm_jax.corpus import PrepareConfig, prepare
from looplm_jax.corpus._worker_pool import Progress
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.recipes import named_recipe
from looplm_jax.training._goodput import Activity, total_seconds
from looplm_jax.training._metrics import read_metrics

_SOURCES = 30
_POD_TOKENS, _POD_HOSTS, _POD_SECONDS = 4_194_304, 64, 8.037  # ouro-1.4b on v5e:16x16, see docs/planning.md
_LENGTHS = (256, 4096)
_BATCH_TOKENS = 2**16


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to read: its name, and the mixture for each length of rows."""

    name: str
    sources: dict[int, tuple[SourceConfig, ...]]


class _Unwatched:
    """A progress watcher that ignores everything."""

    def begin(self, what: str, *, bytes: int, done: int) -> None:
        """Does nothing."""

    def advance(self, progress: Progress) -> None:
        """Does nothing."""

    def finish_unit(self, bytes: int) -> None:
        """Does nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each way is read")
    parser.add_argument("--steps", type=int, default=30, help="steps of each small run; 0: none")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = _collect(root)
        ways = _prepare_all(root, tokenizer, options.workers)

        needed = _POD_TOKENS / _POD_HOSTS / _POD_SECONDS
        print(f"| read | {' | '.join(f'tokens/s, rows of {length:,}' for length in _LENGTHS)} | of what a host needs |")
        print("|---|---|---|---|")
        for way in ways:
            speeds = [_speed(sources, tokenizer, length, options.seconds) for length, sources in way.sources.items()]
            cells = " | ".join(f"{speed:,.0f}" for speed in speeds)
            print(f"| {way.name} | {cells} | {speeds[-1] / needed:,.1f} times {needed:,.0f} |", flush=True)

        if options.steps:
            print("\n| a small run on | tokens/s | waits for input |\n|---|---|---|")
            for way in ways:
                print(f"| {way.name} | {_train(way, root, options.steps)} |", flush=True)


# Preparing the three ways to read


def _collect(root: Path) -> Tokenizer:
    """Writes the text as one file and as 30, and returns a tokenizer for it."""
    data.collect_stdlib(root / "all.jsonl")
    lines = (root / "all.jsonl").read_text().splitlines(keepends=True)
    for number in range(_SOURCES):
        (root / f"part-{number}.jsonl").write_text("".join(lines[number::_SOURCES]))
    # The vocabulary size of the recipe that is trained later.
    texts = data.training_texts(DataConfig(sources=(SourceConfig(path=str(root / "all.jsonl")),)))
    tokenizer = data.train_sentencepiece(texts, named_recipe("text-small").model.vocab_size)
    (root / "tokenizer.model").write_bytes(tokenizer.serialize())
    return tokenizer


def _prepare_all(root: Path, tokenizer: Tokenizer, workers: int) -> tuple[Way, ...]:
    """Prepares every corpus at every length, and returns the three ways to read."""
    names = ["all", *(f"part-{number}" for number in range(_SOURCES))]
    for length in _LENGTHS:
        started = time.perf_counter()
        for name in names:
            config = PrepareConfig(
                sources=(SourceConfig(path=str(root / f"{name}.jsonl")),),
                tokenizer=tokenizer,
                sequence_length=length,
                validation_fraction=0.0,
                unit_bytes=2**22,
            )
            manifest = prepare(config, str(root / f"{name}-{length}"), workers=workers, watcher=_Unwatched())
            if name == "all":
                _say_speed(length, manifest.tokens, manifest.sources[0].bytes, time.perf_counter() - started, workers)

    def of(chosen: Sequence[str]) -> dict[int, tuple[SourceConfig, ...]]:
        return {n: tuple(SourceConfig(path=str(root / f"{name}-{n}")) for name in chosen) for n in _LENGTHS}

    return (
        Way("JSONL, tokenized on the fly", dict.fromkeys(_LENGTHS, (SourceConfig(path=str(root / "all.jsonl")),))),
        Way("prepared rows of one source", of(names[:1])),
        Way(f"prepared rows of {_SOURCES} sources", of(names[1:])),
    )


def _say_speed(length: int, tokens: int, size: int, seconds: float, workers: int) -> None:
    """Prints the speed of preparation."""
    print(
        f"{workers} workers prepared rows of {length:,} at {size / seconds / 1e6:.1f} MB/s of text, "
        f"{tokens / seconds:,.0f} tokens/s\n"
    )


# Reading, and training on what is read


def _speed(sources: tuple[SourceConfig, ...], tokenizer: Tokenizer, length: int, seconds: float) -> float:
    """Returns the tokens per second that a process reads when it does nothing else."""
    config = DataConfig(sources=sources, validation_fraction=0.0)

    rows = _BATCH_TOKENS // length
    batches = data.train_batches(config, tokenizer, batch_size=rows, sequence_length=length, seed=0)

    # The prefetched batches were read while the stream was opened.
    for _ in range(4):
        next(batches)

    started, tokens = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        tokens += int((next(batches).segment_ids > 0).sum())
    elapsed = time.perf_counter() - started
    batches.close()
    return tokens / elapsed


def _train(way: Way, root: Path, steps: int) -> str:
    """Returns tokens per second of a small run, and the fraction of time after step 1 spent waiting for input."""
    recipe = _small(way, root, steps)
    file, out = root / "recipe.json", root / f"run-{len(list(root.glob('run-*')))}"
    file.write_text(json.dumps(to_dict(recipe)))
    command = [sys.executable, "-m", "looplm_jax.cli.main", "train", "--recipe", str(file), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)

    # The first step is left out, because its time includes compilation.
    rows = [row for row in read_metrics(out) if row["kind"] == "train"][1:]
    seconds = total_seconds(rows)
    working = seconds[Activity.STEP] + seconds[Activity.INPUT]
    tokens = (steps - 1) * recipe.stages[0].batch_size * recipe.stages[0].sequence_length
    return f"{tokens / working:,.0f} | {seconds[Activity.INPUT] / working:.2%}"


def _small(way: Way, root: Path, steps: int) -> Recipe:
    """Returns the small recipe on one way to read."""
    recipe = named_recipe("text-small")
    stage = dataclasses.replace(recipe.stages[0], steps=steps, warmup_steps=0, decay_steps=0)
    return dataclasses.replace(
        recipe,
        stages=(stage,),
        data=DataConfig(
            sources=way.sources[stage.sequence_length],
            tokenizer=str(root / "tokenizer.model"),
            validation_fraction=0.0,
        ),
        evaluation=EvaluationConfig(every=0),
        log_every=1,
    )


if __name__ == "__main__":
    main()
