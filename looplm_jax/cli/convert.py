"""Convert weights: Hugging Face folders, deeper stacks, dense models.

looplm convert from-hf Ouro-1.4B runs/ouro                  # a Hugging Face folder becomes a checkpoint
looplm convert to-hf runs/text-small exported               # and back, with a working PyTorch model
looplm convert upcycle runs/ouro runs/deep --layers 48      # every layer twice
looplm convert from-dense SmolLM2-135M runs/looped          # a Llama becomes the start of a looped model
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from looplm_jax.config import NormPlacement
from looplm_jax.errors import UserError
from looplm_jax.printing import show

_FLOATS = ("float32", "bfloat16")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert`, with one subcommand per direction."""
    # argparse does not require a subcommand by default.
    parser.set_defaults(convert=None)
    commands = parser.add_subparsers(title="directions", metavar="DIRECTION", parser_class=type(parser))
    _from_hf(_direction(commands, "from-hf", "a Hugging Face Ouro folder becomes a checkpoint", _run_from_hf))
    _to_hf(_direction(commands, "to-hf", "a checkpoint becomes a Hugging Face folder", _run_to_hf))
    _upcycle(_direction(commands, "upcycle", "a checkpoint with every layer copied", _run_upcycle))
    _from_dense(_direction(commands, "from-dense", "a Llama-layout model becomes the start of a loop", _run_from_dense))


def run(arguments: argparse.Namespace) -> int:
    """Converts, and prints what was written and which command to run next. Returns the exit status."""
    if arguments.convert is None:
        raise UserError(
            "say which way: looplm convert from-hf, to-hf, upcycle or from-dense; see `looplm convert --help`"
        )

    arguments.convert(arguments)
    return 0


# Arguments of each direction


def _direction(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    convert: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    """Adds a subcommand whose `convert` default is the function that runs it."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(convert=convert)
    return parser


def _from_hf(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert from-hf`."""
    parser.add_argument("folder", type=Path, help="config.json, safetensors and tokenizer.json of an Ouro model")
    _out(parser)
    parser.add_argument("--dtype", choices=_FLOATS, help="of the parameters (default: as in the files)")


def _to_hf(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert to-hf`."""
    _checkpoint(parser)
    parser.add_argument("--step", type=int, help="which step (default: the latest valid one)")
    _out(parser)
    parser.add_argument("--dtype", choices=_FLOATS, help="of the weights (default: as in the checkpoint)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="500MB, 5GB, ... (default: 5GB)")


def _upcycle(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert upcycle`."""
    _checkpoint(parser)
    _out(parser)
    parser.add_argument(
        "--layers", type=int, required=True, metavar="N", help="a multiple of the layers that are there"
    )

    parser.add_argument(
        "--order",
        choices=("interleave", "stack"),
        default="stack",
        help="0 0 1 1 ... or 0 1 ... 0 1 ...; see docs/upcycling.md (default: stack)",
    )


def _from_dense(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert from-dense`."""
    parser.add_argument("folder", type=Path, help="config.json, safetensors and tokenizer.json of a Llama-layout model")
    _out(parser)
    parser.add_argument("--loops", type=int, default=4, metavar="T", help="loops of the looped model (default: 4)")

    parser.add_argument(
        "--norms",
        choices=[placement.value for placement in NormPlacement],
        default=NormPlacement.PRE.value,
        help="pre: loop 1 is the dense model; sandwich: as in Ouro, which training must win back (default: pre)",
    )
    parser.add_argument(
        "--second-norm",
        type=float,
        default=1.0,
        metavar="W",
        help="sandwich: first weight of the norms after the branches; see docs/dense_start.md (default: 1)",
    )

    parser.add_argument("--dtype", choices=_FLOATS, help="of the parameters (default: as in the files)")
    parser.add_argument("--seed", type=int, default=0, help="of the gate (default: 0)")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, or one step; any fsspec URL")


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write; must be empty, or not there yet")


# Running each direction


def _run_from_hf(arguments: argparse.Namespace) -> None:
    from looplm_jax.convert import convert_from_hf

    summary = convert_from_hf(arguments.folder, arguments.out, dtype=arguments.dtype)
    _finish(summary, f"looplm generate {_quoted(arguments.out)} --prompt 'Once'")


def _run_to_hf(arguments: argparse.Namespace) -> None:
    from looplm_jax.convert import convert_to_hf, parse_size

    summary = convert_to_hf(
        arguments.checkpoint,
        arguments.out,
        step=arguments.step,
        dtype=arguments.dtype,
        max_shard_bytes=parse_size(arguments.max_shard_size),
    )
    _finish(summary, f"less {_quoted(arguments.out / 'README.md')}")


def _run_upcycle(arguments: argparse.Namespace) -> None:
    from looplm_jax.convert import Order, upcycle

    summary = upcycle(arguments.checkpoint, arguments.out, layers=arguments.layers, order=Order(arguments.order))
    train = f"looplm train --model.num_layers {arguments.layers} --start.checkpoint {_quoted(arguments.out)}"
    _finish(summary, f"{train} --data 'mine/*.jsonl'")


def _run_from_dense(arguments: argparse.Namespace) -> None:
    from looplm_jax.convert import convert_from_dense

    summary = convert_from_dense(
        arguments.folder,
        arguments.out,
        loops=arguments.loops,
        norm_placement=NormPlacement(arguments.norms),
        second_norm=arguments.second_norm,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    _finish(summary, f"looplm evaluate {_quoted(arguments.out)} --data 'mine/*.jsonl'")


def _finish(summary: object, then: str) -> None:
    show(str(summary))
    show(f"next: {then}")


def _quoted(path: Path) -> str:
    from looplm_jax.files import pasted

    return pasted(path)
