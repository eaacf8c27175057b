"""Conversion of Ouro-1.4B's shape to and from the Hugging Face format: time, peak memory, and bit-exactness.

    python -m experiments.benchmarks.conversion --folder runs/conversion

Creates a folder of random bfloat16 weights in the released shape with a tokenizer.json of 49,152 tokens, then converts
from-hf, to-hf, and from-hf again, each in its own process. Prints the seconds of each process and its peak resident
memory, next to those of a process that only imports what a conversion imports. Then compares every tensor of the
exported folder with the original, and every array of the last checkpoint with the first. Needs four times the weights
(2.9 GB) of disk space in `--folder`, and removes what it wrote. `--layers` makes the model smaller.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.benchmarks.ceiling import peak_memory
from looplm_jax.checkpoints._step import list_steps, read_metadata_file
from looplm_jax.config import ModelConfig
from looplm_jax.convert import convert_from_hf, convert_to_hf
from looplm_jax.convert._layout import TorchTensor, array_shapes, torch_layout
from looplm_jax.convert._ouro_config import to_ouro_config
from looplm_jax.convert._safetensors_io import WeightFolder, write_weights
from looplm_jax.models import presets

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CONVERSIONS: dict[str, Callable[[str, str], object]] = {"from-hf": convert_from_hf, "to-hf": convert_to_hf}
_IMPORTS = "imports only"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one process."""

    name: str
    seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The cost of every process, imports first, the bytes of the weights, and the names of all that differs."""

    costs: tuple[Cost, ...]
    weight_bytes: int
    differing: tuple[str, ...]

    def markdown(self) -> str:
        """Returns a table with one row per conversion."""
        imports, *conversions = self.costs
        lines = [
            "| conversion | seconds | peak memory | of the weights | without the imports |",
            "|---|---|---|---|---|",
        ]
        for cost in conversions:
            whole, added = cost.peak_bytes, cost.peak_bytes - imports.peak_bytes
            ratios = f"{whole / self.weight_bytes:.2f}x | {added / self.weight_bytes:.2f}x"
            lines.append(f"| {cost.name} | {cost.seconds:.1f} | {_gigabytes(whole)} | {ratios} |")
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns 1 if anything differs after the round trip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--layers", type=int, default=24, help="layers of the model (default: 24)")
    parser.add_argument("--process", nargs=3, metavar=("CONVERSION", "IN", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    if arguments.process:
        return _convert(*arguments.process)
    if arguments.folder is None or arguments.folder.exists():
        parser.error("--folder must name a folder that does not exist")

    config = dataclasses.replace(presets.ouro_1_4b(), num_layers=arguments.layers)
    measured = measure(arguments.folder, config)

    print(f"{config.num_layers} layers, weights of {_gigabytes(measured.weight_bytes)} in bfloat16")
    print(f"a process that only imports: {_gigabytes(measured.costs[0].peak_bytes)}\n")
    print(measured.markdown())
    print(f"\nnot bit-identical: {', '.join(measured.differing) or 'nothing'}")
    return 1 if measured.differing else 0


# Measuring


def measure(folder: Path, config: ModelConfig) -> Measured:
    """Converts a random model of a shape to and from our format in `folder`, which is removed at the end."""
    theirs, ours, exported, again = (folder / name for name in ("theirs", "ours", "exported", "again"))
    with contextlib.ExitStack() as closing:
        closing.callback(shutil.rmtree, folder)
        theirs.mkdir(parents=True)
        weight_bytes = write_random_model(theirs, config)
        costs = (
            _run(_IMPORTS, theirs, ours),
            _run("from-hf", theirs, ours),
            _run("to-hf", ours, exported),
            _run("from-hf", exported, again),
        )

        differing = (*_differing_tensors(theirs, exported), *_differing_arrays(ours, again))
    return Measured(costs=costs, weight_bytes=weight_bytes, differing=differing)


# The model that is converted


def write_random_model(folder: Path, config: ModelConfig) -> int:
    """Writes a Hugging Face folder as published: one file of bfloat16. Returns the bytes of the weights."""
    numbers = np.random.default_rng(0)

    def draw(tensor: TorchTensor) -> np.ndarray:
        return (numbers.standard_normal(tensor.shape, np.float32) * np.float32(0.02)).astype(jnp.bfloat16)

    layout = list(torch_layout(array_shapes(config)))
    written = write_weights(folder, layout, draw, dtype="bfloat16", max_bytes=sys.maxsize)

    (folder / "config.json").write_text(json.dumps(to_ouro_config(config, dtype="bfloat16")))
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer(config.vocab_size)))
    return written.bytes


def byte_level_tokenizer(vocab_size: int) -> dict[str, object]:
    """Returns a `tokenizer.json` of Ouro's kind: its special tokens, the 256 bytes, and merges of pairs of these."""
    # The alphabet of byte-level BPE: printable bytes stand for themselves, all others for characters from U+0100 on.
    printable = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    letters = printable + [chr(0x100 + code) for code in range(256 - len(printable))]

    needed = vocab_size - len(_SPECIAL) - len(letters)
    merges = [f"{first} {second}" for first in letters for second in letters][:needed]
    pieces = [*_SPECIAL, *letters, *(merge.replace(" ", "") for merge in merges)]

    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": name, **special} for token, name in enumerate(_SPECIAL)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {piece: token for token, piece in enumerate(pieces)}, "merges": merges},
    }


# One conversion in its own process


def _run(name: str, source: Path, out: Path) -> Cost:
    """Runs a conversion in its own process."""
    command = [sys.executable, "-m", "experiments.benchmarks.conversion", "--process", name, str(source), str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Cost(name=name, seconds=time.perf_counter() - start, peak_bytes=int(done.stdout.splitlines()[-1]))


def _convert(name: str, source: str, out: str) -> int:
    """Runs a conversion in this process, and prints its peak resident bytes."""
    if name == _IMPORTS:
        # JAX initializes its backend only at the first computation.
        jnp.zeros(8).block_until_ready()
    else:
        _CONVERSIONS[name](source, out)
    print(peak_memory())
    return 0


# Comparing the results


def _differing_tensors(first: Path, second: Path) -> Iterator[str]:
    """Yields the names of tensors that are not bit-identical in two Hugging Face folders, reading one at a time."""
    one, other = WeightFolder.open(first), WeightFolder.open(second)
    for name in {**one.tensors, **other.tensors}:
        if name not in one.tensors or name not in other.tensors:
            yield name
            continue

        a, b = one.read(name), other.read(name)
        if (a.dtype, a.shape) != (b.dtype, b.shape) or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            yield name


def _differing_arrays(first: Path, second: Path) -> Iterator[str]:
    """Yields the names of arrays whose digests differ in two checkpoints. Writing a step verified each digest."""
    one, other = (
        read_metadata_file(list_steps(epath.Path(path) / "checkpoints")[-1]).arrays for path in (first, second)
    )
    yield from (name for name in {**one, **other} if one.get(name) != other.get(name))


def _gigabytes(size: int) -> str:
    """Returns a size as text."""
    return f"{size / 10**9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
