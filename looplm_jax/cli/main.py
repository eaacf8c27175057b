"""The `looplm` command line. User errors end in one line and exit status 2.

`flags` has the parsers, `commands` the checks before JAX is imported, and one module per command does the work.
"""

import argparse
import errno
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from looplm_jax.cli._compilation_cache import OFF, keep_compiled_programs
from looplm_jax.errors import UserError, suggest
from looplm_jax.terminal import harden_streams, print_error

_COMMANDS = {
    "tokenize": "prepare a corpus: tokenize and pack documents once, to be read at random",
    "train": "train a looped language model through the stages of a recipe",
    "plan": "compile a recipe for a TPU slice: does it fit, what does it send, how fast can it be",
    "evaluate": "loss and accuracy at every depth and against mean loops, or tasks of lm-evaluation-harness",
    "generate": "continue a prompt, with as many loops as each token needs",
    "chat": "talk with a model, whose cache is kept between turns",
    "inspect": "the contents of a checkpoint, and whether it is valid",
    "convert": "Hugging Face and PyTorch weights in and out; deeper stacks; dense models",
}

# These commands compile programs, so they have the flag that disables the cache.
_COMPILING = ("train", "evaluate", "generate", "chat")

# In these commands, flags that are not configured are fields of the recipe.
_WITH_OVERRIDES = ("train", "plan")

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for a user error, or 128 + n if signal n stopped it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    harden_streams()
    return exit_status(lambda: _dispatch(arguments))


def exit_status(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit status. Errors of the user and of the system end in one line."""
    try:
        status = command()
        # Flushed here, so that a closed pipe raises inside the try block.
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error), error.status)
    # The reader, such as `head`, has seen enough.
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"no space left on the disk{_at(error)}: free some and run the same command again")
        # Raised by `tempfile`, which a library may call, without the name of a file.
        if "temporary directory" in str(error):
            return _fail(f"{error.strerror}; set TMPDIR to a folder that can be written to")
        # Not an error of a file: a bug, which needs its traceback.
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")


def _fail(message: str, status: int = 2) -> int:
    """Prints an error and returns the exit status."""
    print_error(message)
    return status


def _at(error: OSError) -> str:
    """Returns the file of an error, as a phrase for the message."""
    return f" while writing {error.filename}" if error.filename else ""


# Dispatch


def _dispatch(arguments: list[str]) -> int:
    """Parses the arguments and runs the command that they name."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"looplm_jax {importlib.metadata.version('looplm_jax')}")
        return 0
    if name not in _COMMANDS:
        raise UserError(f"unknown command {name!r}{suggest(name, _COMMANDS)}")

    # Imported only now, because `looplm --help` does not need the recipes.
    from looplm_jax.cli import commands, flags
    from looplm_jax.cli._common import expand_paths

    # A command is a pair of functions, for example `flags.configure_train` and `commands.run_train`.
    run: Run = getattr(commands, f"run_{name}")
    parser = Parser(
        prog=f"looplm {name}",
        description=inspect.getdoc(run),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    getattr(flags, f"configure_{name}")(parser)
    if name in _COMPILING:
        parser.add_argument(OFF, action="store_true", help="do not keep compiled programs in ~/.cache/looplm_jax")

    if name in _WITH_OVERRIDES:
        namespace, overrides = parser.parse_known_args(arguments[1:])
        namespace.overrides, namespace.flags = overrides, parser.known_flags()
    else:
        namespace = parser.parse_args(arguments[1:])
    expand_paths(namespace)

    # The cache has to be configured before JAX is imported.
    if not getattr(namespace, "no_compilation_cache", True):
        keep_compiled_programs()
    return run(namespace)


def _overview() -> str:
    """Returns the text of `looplm --help`."""
    lines = ["usage: looplm COMMAND ...", "", "Looped language models in JAX.", ""]
    lines += [f"  {name:10} {text}" for name, text in _COMMANDS.items()]
    return "\n".join([*lines, "", "`looplm COMMAND --help` says more."])


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError, with a suggestion for a misspelled flag."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flag = message.removeprefix(prefix).split()[0]
            otherwise = f"; `{self.prog} --help` lists the flags"
            hint = suggest(flag.partition("=")[0], self.known_flags(), otherwise)
            raise UserError(f"unknown argument {flag!r}{hint}")
        raise UserError(f"{message}; see `{self.prog} --help`")

    def known_flags(self) -> list[str]:
        """Returns every configured flag, including those of subcommands."""
        own = [option for action in self._actions for option in action.option_strings]
        groups = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return own + [flag for group in groups for parser in group.values() for flag in parser.known_flags()]


if __name__ == "__main__":
    sys.exit(main())
