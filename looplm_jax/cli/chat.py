"""Talk with a model that knows chat (ChatML), and see how many loops its tokens took.

    looplm chat runs/ouro --system 'Be brief.' --exit q=0.5

Between turns the cache is kept: of each turn, only what is new is read. Lines come from the terminal, or from a pipe
until it ends. Ctrl-C cuts an answer short. A line that begins with a slash is a command; /help lists them.
"""

import argparse

from looplm_jax.cli.generation_flags import configure_generation


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `looplm chat`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, one step, or a Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before everything else")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens of the whole chat (default: 4096, or the model's positions)"
    )
    configure_generation(parser)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the input ends or `/exit`."""
    from looplm_jax.cli.chat_session import run_chat

    return run_chat(arguments)
