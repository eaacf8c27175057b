"""Chat with a model that supports ChatML, and see how many loops its tokens used.

    looplm chat runs/ouro --system 'Be brief.' --exit q=0.5

The cache is kept between turns, so only the new tokens of each turn are processed. Lines come from the terminal, or
from a pipe until it ends. Ctrl-C stops an answer. A line that starts with a slash is a command; /help lists them.
"""

import argparse

from looplm_jax.cli.generation_flags import configure_generation


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm chat`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, one step, or a Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before everything else")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens of the whole chat (default: 4096, or the model's positions)"
    )
    configure_generation(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the chat until the input ends or the user types `/exit`. Returns the exit status."""
    from looplm_jax.cli.chat_session import run_chat

    return run_chat(arguments)
