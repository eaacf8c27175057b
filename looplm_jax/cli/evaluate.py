"""Measure loss and accuracy at every depth, and loss against mean loops; or run tasks of lm-evaluation-harness.

    looplm evaluate runs/text-small
    looplm evaluate runs/text-small --tasks arc_easy,wikitext --exit q=0.5
    looplm evaluate runs/text-small --tasks looplm_smoke --depth-sweep

Reads the held-out documents of the checkpoint's own data, or of other files. Tasks download their own data, except
looplm_smoke, whose data is included; they need pip install 'looplm_jax[eval]'.
"""

import argparse

from looplm_jax.cli.generation_flags import EXIT_RULES, configure_dtype
from looplm_jax.errors import UserError

_OF_TASKS = (
    "exit",
    "loops",
    "depth_sweep",
    "limit",
    "num_fewshot",
    "include_path",
    "batch_size",
    "max_length",
    "add_bos_token",
    "special_tokens",
)
_OF_HELD_OUT_DATA = ("sequences", "data", "validation_fraction")
_COUNTS = ("max_loops", "sequences", "limit", "batch_size")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm evaluate`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, one step, or a Hugging Face folder")
    parser.add_argument("--step", type=int, help="which step (default: the latest valid one)")
    parser.add_argument("--max-loops", type=int, metavar="T", help="deepest loop (default: twice the trained depth)")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: <run>/evaluation/step_N)")
    configure_dtype(parser)
    _configure_held_out_data(parser.add_argument_group("held-out documents"))
    _configure_tasks(parser.add_argument_group("tasks of lm-evaluation-harness"))
    parser.epilog = EXIT_RULES


def _configure_held_out_data(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments about held-out documents."""
    group.add_argument("--sequences", type=int, metavar="N", help="held-out sequences (default: those of the recipe)")
    group.add_argument("--data", metavar="PATH", help="other files, a glob or a URL; their held-out documents are read")
    group.add_argument(
        "--validation-fraction", type=float, metavar="F", help="share of documents held out (default: the recipe's)"
    )


def _configure_tasks(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments about tasks."""
    group.add_argument(
        "--tasks",
        metavar="A,B",
        help="tasks, groups or patterns with *; `lm_eval ls tasks` lists them, save looplm_smoke",
    )

    depth = group.add_mutually_exclusive_group()
    depth.add_argument("--exit", metavar="RULE", help="see below (default: the loops that the model is meant for)")
    depth.add_argument("--loops", type=int, metavar="N", help="the same as --exit loops=N")
    depth.add_argument(
        "--depth-sweep",
        action="store_true",
        default=None,
        help="a score for each of the loops 1..T of --max-loops; log-likelihoods of all come from one forward pass, "
        "text is generated once for each",
    )

    group.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    group.add_argument("--num-fewshot", type=int, metavar="K", help="examples before each question")
    group.add_argument(
        "--include-path", metavar="DIR", help="a folder with YAML files of other tasks, whose code is run"
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="requests at one time (default: 8)")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens that the model reads (default: all its positions)"
    )

    group.add_argument(
        "--add-bos-token", action="store_true", default=None, help="put a bos before every context (default: none)"
    )
    group.add_argument(
        "--special-tokens",
        action="store_true",
        default=None,
        help="names of special tokens in texts, such as <|im_end|>, become these tokens (default: they are text)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, prints the tables and writes the files. Returns the exit status."""
    for name in _COUNTS:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{_flag(name)} must be at least 1, not {value}")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise UserError(f"--num-fewshot must not be negative, not {arguments.num_fewshot}")

    if arguments.tasks is None:
        # Checked before the imports of the sessions, which take seconds.
        _refuse(arguments, _OF_TASKS, "is for tasks: give --tasks too")
        from looplm_jax.cli.evaluation_session import run_evaluation

        return run_evaluation(arguments)

    _refuse(arguments, _OF_HELD_OUT_DATA, "is for held-out documents: leave it or --tasks out")
    if arguments.max_loops is not None and not arguments.depth_sweep:
        raise UserError("--max-loops is for --depth-sweep here; use --loops for a fixed number of loops")
    from looplm_jax.cli.task_session import run_task_evaluation

    return run_task_evaluation(arguments)


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """Raises UserError for the first of the arguments that is set."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserError(f"{_flag(name)} {why}")


def _flag(name: str) -> str:
    """Returns the flag of an argument."""
    return f"--{name.replace('_', '-')}"
