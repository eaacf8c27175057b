"""Continue a prompt, with as many loops as each token needs.

    looplm generate runs/text-small --prompt 'def main(' --exit q=0.5

On a terminal the colour of the text says how many loops it took.
"""

import argparse
from pathlib import Path

from looplm_jax.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `looplm generate`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, or one step")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue (UTF-8)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 128, or what the positions leave")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest P; 1: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exit", default="q=0.5", metavar="RULE", help="loops=N or q=Q (default: q=0.5)")
    parser.add_argument("--step", type=int, help="which step (default: the newest good one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with tokens, pieces and exit loops")


def run(arguments: argparse.Namespace) -> int:
    """Generate, and say what it took."""
    prompt = _prompt(arguments)
    from looplm_jax.cli.generation_session import run_generation

    return run_generation(prompt, arguments)


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        text = arguments.prompt or ""
    else:
        try:
            text = Path(arguments.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{arguments.prompt_file} is not UTF-8 text; convert it") from None
    if not text:
        raise UserError("the prompt is empty; give --prompt TEXT or --prompt-file FILE")
    return text
