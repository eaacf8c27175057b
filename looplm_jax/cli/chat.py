"""The work of `looplm chat`: reads a line, prints an answer, and handles commands in between."""

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from looplm_jax.cli._common import interrupt_calls
from looplm_jax.cli._generation import GenerationOptions, compiling_spinner, make_engine, max_loops, request_options
from looplm_jax.cli._views import ColorView, PlainView, Stopwatch, View, legend
from looplm_jax.convert._tokenizer_files import has_other_chat_template
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError, suggest
from looplm_jax.halting import parse_exit_policy
from looplm_jax.inference import Finish
from looplm_jax.inference._conversation import Conversation
from looplm_jax.loading import load
from looplm_jax.terminal import print_error

# By default; the cache for all positions of a model may be large.
_WINDOW = 4096
_HELP = """\
/reset           forget what was said
/loops N         N loops for every token from here on
/exit-rule RULE  another exit rule, as for --exit
/exit            end; so does the end of the input
/help            this list"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions(GenerationOptions):
    """The options of `looplm chat`, as its flags give them."""

    system: str | None
    max_new_tokens: int
    window: int | None


def chat_with_model(options: ChatOptions) -> int:
    """Chats until the input ends. Returns the exit status: 2 if a piped line was a user error."""
    # Checked before the checkpoint is read, which may take minutes.
    request = {**request_options(options), "max_new_tokens": options.max_new_tokens}

    loaded = load(options.checkpoint, step=options.step, dtype=options.dtype)
    window = _window(options.window, loaded.model.config.max_positions)
    engine = make_engine(loaded, options, window=window)
    tokenizer = loaded.need_tokenizer()

    conversation = Conversation(engine, tokenizer, options.system)
    if has_other_chat_template(tokenizer):
        print_error("note: the chat template of this model is not ChatML, but this chat is; answers may suffer")
    return ChatSession(conversation, tokenizer, request, max_loops=max_loops(loaded, options)).run()


class ChatSession:
    """A chat session: reads lines and prints answers until the input ends."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer, options: dict[str, Any], *, max_loops: int):
        self._conversation, self._tokenizer = conversation, tokenizer
        self._options, self._max_loops = options, max_loops
        self._console = Console(highlight=False)
        # A script must notice errors by the exit status, a user reads them.
        self._by_hand = sys.stdin.isatty()
        self._status: int | None = None  # once set, the chat ends with this status
        self._mistakes = False

        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": lambda _: conversation.reset(),
            "/loops": lambda number: self._exit_rule(f"loops={number}"),
            "/exit-rule": self._exit_rule,
            "/exit": lambda _: self._end(0),
            "/help": lambda _: print(_HELP),
        }

    def run(self) -> int:
        """Runs the session and returns the exit status."""
        if self._by_hand:
            print("/help lists the commands, Ctrl-D ends")
            if self._in_color:
                self._console.print(legend(self._max_loops))

        for line in self._lines():
            try:
                self._obey(line)
            except UserError as error:
                # The chat continues: one line that cannot be answered does not end it.
                self._mistakes = True
                print_error(str(error))
            if self._status is not None:
                return self._status

        # At a terminal the user sees each error and types again, so errors do not count.
        return 2 if self._mistakes and not self._by_hand else 0

    @property
    def _in_color(self) -> bool:
        """Whether the terminal shows colors."""
        return self._console.is_terminal and not self._console.no_color

    def _lines(self) -> Iterator[str]:
        """Yields the lines of the user, without empty ones."""
        # input() provides line editing at a terminal; its sentinel None never matches.
        source = iter(lambda: input("> "), None) if self._by_hand else sys.stdin
        try:
            # Blank lines are not turns.
            yield from filter(None, map(str.strip, source))
        except EOFError:
            print()
        except UnicodeDecodeError:
            raise UserError("the input is not UTF-8 text; convert it") from None

    def _obey(self, line: str) -> None:
        """Runs a command, or answers any other line."""
        if not line.startswith("/"):
            self._answer(line)
            return

        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise UserError(f"unknown command {name}{suggest(name, self._commands)}")
        self._commands[name](argument.strip())

    def _answer(self, line: str) -> None:
        """Streams the answer to one line."""
        view, clock = self._view(), Stopwatch()
        with interrupt_calls(self._conversation.stop), compiling_spinner() as status:
            for new in self._conversation.say(line, **self._options):
                status.stop()
                clock.tick(new)
                view.show(new)

        # say() sets the result when its iterator ends.
        result = self._conversation.result
        assert result is not None
        view.finish(result, clock.rate)
        # A terminal user continues after Ctrl-C; a script has to see that it was interrupted.
        if result.finish is Finish.CANCELLED and not self._by_hand:
            self._end(128 + signal.SIGINT)

    def _view(self) -> View:
        """Returns the view for the next answer."""
        if self._in_color:
            return ColorView(self._console, self._tokenizer, max_loops=self._max_loops)
        return PlainView()

    def _exit_rule(self, text: str) -> None:
        """Sets the exit policy. Raises UserError if it needs more loops than the cache was allocated for."""
        policy = parse_exit_policy(text)
        # The planes of the cache were allocated for max_loops.
        if (policy.max_loops or 0) > self._max_loops:
            raise UserError(
                f"{policy.max_loops} loops are more than the {self._max_loops} that this chat was started for; "
                f"start it with --exit loops={policy.max_loops}"
            )
        self._options["policy"] = policy

    def _end(self, status: int) -> None:
        """Ends the chat after the current line."""
        self._status = status


def _window(wanted: int | None, positions: int) -> int:
    """Returns the number of positions of the chat. Raises UserError if the model has fewer."""
    if wanted is None:
        return min(_WINDOW, positions)
    if not 1 <= wanted <= positions:
        raise UserError(f"--window must be in 1..{positions}, the positions of the model, not {wanted}")
    return wanted
