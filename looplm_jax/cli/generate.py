"""Continue a prompt, with as many loops as each token needs.

    looplm generate runs/text-small --prompt 'def main(' --exit q=0.5

On a terminal, the color of the text shows how many loops it used. Ctrl-C stops generation and keeps the text so far.
"""

import argparse
from pathlib import Path

from looplm_jax.cli.generation_flags import configure_generation
from looplm_jax.errors import UserError
from looplm_jax.files import read_text


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm generate`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, one step, or a Hugging Face folder")

    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated, all are continued at once"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue (UTF-8)")

    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="names of special tokens in the prompt, such as <|im_end|>, become these tokens (default: they are text)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 128, or what the positions leave")

    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="texts for each prompt, each drawn anew (default: 1)"
    )
    parser.add_argument(
        "--index", type=int, default=0, metavar="I", help="draw for the first prompt as for prompt I of a longer list"
    )

    configure_generation(parser)
    parser.add_argument(
        "--revise", action="store_true", help="show each token as it stands after every loop, and revise it"
    )
    parser.add_argument(
        "--draft-loops",
        type=int,
        metavar="S",
        help="self-speculation: drafts by loop S, verified by the loops of --exit loops=T; the text is that of T",
    )
    parser.add_argument(
        "--drafts", type=int, default=4, metavar="K", help="drafts before they are verified (default: 4)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a prompt: text, tokens, exit loops")


def run(arguments: argparse.Namespace) -> int:
    """Generates text, and prints its cost. Returns the exit status."""
    prompts = _prompts(arguments)
    if arguments.draft_loops is not None:
        from looplm_jax.cli.speculation_session import run_speculation

        return run_speculation(prompts, arguments)
    from looplm_jax.cli.generation_session import run_generation

    return run_generation(prompts, arguments)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Returns the prompts. Raises UserError if one is empty."""
    # Without a prompt the text is empty, which is refused with a hint.
    texts = [read_text(Path(arguments.prompt_file))] if arguments.prompt_file else arguments.prompt or [""]
    if not all(texts):
        raise UserError("the prompt is empty; give --prompt TEXT or --prompt-file FILE")
    return texts
