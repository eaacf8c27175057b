"""Runs every command of an installed `looplm` once, in an empty folder, and stops at the first failure.

    python every_command.py path/to/looplm

Uses only the standard library and the command itself, so that it runs the installed package.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = {
    "model.width": 32,
    "model.mlp_width": 48,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.loops": 2,
    "model.vocab_size": 320,
    "stage.loops": 2,
    "stage.steps": 2,
    "stage.batch_size": 2,
    "stage.sequence_length": 32,
    "stage.warmup_steps": 1,
    "stages.pretrain.decay_steps": 1,
    "mesh.data": 1,
    "evaluation.sequences": 2,
}
# The recipe keeps its model, and takes three short steps.
SHORT = {"stage.steps": 3, "stage.batch_size": 2, "stage.sequence_length": 64, "stage.warmup_steps": 1, "mesh.data": 1}
COMMANDS = ("tokenize", "train", "plan", "evaluate", "generate", "chat", "inspect", "convert")
SENTENCE = "a looped model applies one stack of layers several times and learns when it may stop"
EXTRA_MISSING = "pip install 'looplm_jax["


def flags(values: dict[str, object]) -> list[str]:
    """Returns the command-line flags that set fields of a recipe."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def commands(corpus: Path) -> list[tuple[str, ...]]:
    """Returns one line per command, ordered so that each finds the output of earlier ones."""
    train = (
        "train",
        "--recipe",
        "text-small",
        "--data",
        str(corpus),
        "--data.validation_fraction",
        "0.3",
        *flags(TINY),
    )
    return [
        ("--version",),
        ("--help",),
        *((name, "--help") for name in COMMANDS),
        ("train", "--recipe", "mano-small", *flags(SHORT), "--out", "mano"),
        (*train, "--dry-run"),
        (*train, "--out", "run"),
        ("inspect", "run"),
        ("evaluate", "run", "--sequences", "2", "--max-loops", "2"),
        ("generate", "run", "--prompt", "a looped", "--max-new-tokens", "4", "--exit", "q=0.5"),
        ("tokenize", str(corpus), "--tokenizer", "run/tokenizer.model", "--sequence-length", "32", "--out", "rows"),
        ("plan", "mano-small", "--topology", "here", "--scale", "tiny"),
        ("convert", "upcycle", "run", "deep", "--layers", "2"),
        ("convert", "to-hf", "run", "exported"),
        ("convert", "from-hf", "exported", "back"),
        ("convert", "from-dense", "--help"),
    ]


def main(looplm: str) -> int:
    """Runs all commands and returns the exit status.

    `from-hf` may end with the line that names a missing extra, because the tested environment has no extras.
    """
    # The programs run only briefly, so compilation dominates.
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        "JAX_PLATFORMS": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": f"{number}: {SENTENCE}"}) + "\n" for number in range(200)))

        for command in commands(corpus):
            began = time.monotonic()
            ran = subprocess.run(
                [looplm, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            print(f"{time.monotonic() - began:6.1f} s  looplm {' '.join(command)[:90]}", flush=True)
            excused = ran.returncode == 2 and EXTRA_MISSING in ran.stderr and command[:2] == ("convert", "from-hf")
            if ran.returncode != 0 and not excused:
                print(ran.stdout, ran.stderr, f"looplm {' '.join(command)}: exit status {ran.returncode}", sep="\n")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]).absolute())))
