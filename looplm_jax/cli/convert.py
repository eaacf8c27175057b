"""The work of `looplm convert`: each direction writes a folder, and prints which command to run next."""

import argparse
from collections.abc import Callable

from looplm_jax.config import NormPlacement
from looplm_jax.convert import Order, convert_from_dense, convert_from_hf, convert_to_hf, parse_size, upcycle
from looplm_jax.files import quoted
from looplm_jax.terminal import show


def _run_from_hf(arguments: argparse.Namespace) -> None:
    summary = convert_from_hf(arguments.folder, arguments.out, dtype=arguments.dtype)
    _finish(summary, f"looplm generate {quoted(arguments.out)} --prompt 'Once'")


def _run_to_hf(arguments: argparse.Namespace) -> None:
    summary = convert_to_hf(
        arguments.checkpoint,
        arguments.out,
        step=arguments.step,
        dtype=arguments.dtype,
        max_shard_bytes=parse_size(arguments.max_shard_size),
    )
    _finish(summary, f"less {quoted(arguments.out / 'README.md')}")


def _run_upcycle(arguments: argparse.Namespace) -> None:
    summary = upcycle(arguments.checkpoint, arguments.out, layers=arguments.layers, order=Order(arguments.order))
    train = f"looplm train --model.num_layers {arguments.layers} --start.checkpoint {quoted(arguments.out)}"
    _finish(summary, f"{train} --data 'mine/*.jsonl'")


def _run_from_dense(arguments: argparse.Namespace) -> None:
    summary = convert_from_dense(
        arguments.folder,
        arguments.out,
        loops=arguments.loops,
        norm_placement=NormPlacement(arguments.norms),
        second_norm=arguments.second_norm,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    _finish(summary, f"looplm evaluate {quoted(arguments.out)} --data 'mine/*.jsonl'")


def _finish(summary: object, command: str) -> None:
    """Prints what was written, and the command to run next."""
    show(str(summary))
    show(f"next: {command}")


DIRECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "from-hf": _run_from_hf,
    "to-hf": _run_to_hf,
    "upcycle": _run_upcycle,
    "from-dense": _run_from_dense,
}
