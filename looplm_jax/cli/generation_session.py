"""Runs `looplm generate`: loads the model, generates, and shows the text."""

import argparse
import dataclasses
import shlex
import signal
from collections.abc import Sequence

from rich.console import Console

from looplm_jax.cli.engine_session import make_engine, most_loops, request_options, sign_of_life
from looplm_jax.cli.generation_views import ColourView, JsonView, PlainView, Stopwatch, View, header
from looplm_jax.cli.interrupts import interrupt_calls
from looplm_jax.convert._tokenizer_files import stop_ids
from looplm_jax.errors import UserError
from looplm_jax.files import pasted
from looplm_jax.halting import ExitPolicy, QExit
from looplm_jax.inference import Engine, Finish, Request, Result, Sampling, Ticket
from looplm_jax.inference.field_checks import whole_number
from looplm_jax.inference.kv_cache import bucket
from looplm_jax.loading import Loaded, load
from looplm_jax.printing import show

_NEW_TOKENS = 128
_MOST_SLOTS = 8


def run_generation(prompts: Sequence[str], arguments: argparse.Namespace) -> int:
    """Runs `looplm generate` with its arguments. Returns the exit status."""
    options = request_options(arguments)
    # From here on `prompts` has one entry per sample.
    sampling, prompts = repeated(options.pop("sampling"), prompts, arguments)

    loaded = load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype)
    count, stops = arguments.max_new_tokens, tuple(stop_ids(loaded.need_tokenizer()))

    clocks = [Stopwatch() for _ in prompts]
    requests = [
        _request(
            loaded,
            prompt,
            count,
            arguments.special_tokens,
            sampling=own,
            stop_ids=stops,
            on_token=clock.tick,
            **options,
        )
        for prompt, own, clock in zip(prompts, sampling, clocks, strict=True)
    ]

    engine = make_engine(
        loaded,
        arguments,
        window=_window(loaded, requests),
        slots=min(len(requests), _MOST_SLOTS),
        queue=len(requests),
        previews=arguments.revise,
    )

    tickets = [engine.submit(request) for request in requests]
    # Canceled requests still have results, so the texts so far are shown.
    with interrupt_calls(lambda: _cancel(tickets)):
        for prompt, ticket, clock in zip(prompts, tickets, clocks, strict=True):
            view = view_of(arguments, loaded, prompt)
            view.finish(_follow(engine, ticket, view), clock.rate)

    status = exit_status([ticket.result() for ticket in tickets])
    if status == 0 and not arguments.json:
        show(f"next: {_next_command(arguments, options['policy'], loaded)}")
    return status


# From prompts to requests


def repeated(
    sampling: Sampling, prompts: Sequence[str], arguments: argparse.Namespace
) -> tuple[list[Sampling], list[str]]:
    """Returns each prompt `--samples` times, with its own random keys.

    Raises UserError if the samples of a prompt would be equal.
    """
    samples = whole_number("--samples", arguments.samples, least=1)
    if samples > 1 and sampling.temperature == 0:
        raise UserError("--samples needs --temperature above 0, such as 1: greedy texts are all the same")

    first = dataclasses.replace(sampling, index=arguments.index)
    numbered = [first.numbered(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    return numbered, [prompt for prompt in prompts for _ in range(samples)]


def _request(loaded: Loaded, prompt: str, count: int | None, special: bool, **options: object) -> Request:
    """Returns the request for one prompt."""
    tokenizer = loaded.need_tokenizer()
    prompt_ids = (tokenizer.bos_id, *tokenizer.encode(prompt, special=special))
    # The prompt starts with a bos token, as the documents of training do.
    count = new_tokens(loaded, len(prompt_ids), count)
    return Request(prompt_ids=prompt_ids, max_new_tokens=count, **options)  # type: ignore[arg-type]


def new_tokens(loaded: Loaded, prompt_tokens: int, wanted: int | None) -> int:
    """Returns the maximum number of new tokens: the requested number, or up to 128 as positions allow."""
    if wanted is not None:
        return wanted
    room = loaded.model.config.max_positions - prompt_tokens
    # Without room the request keeps 128, so that the engine refuses it with its own message.
    return min(_NEW_TOKENS, room) if room > 0 else _NEW_TOKENS


def _window(loaded: Loaded, requests: Sequence[Request]) -> int:
    """Returns the positions that the longest request needs, rounded up so that few shapes are compiled."""
    longest = loaded.model.config.max_positions
    wanted = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    return bucket(min(wanted, longest), longest)


# Showing the answers


def _follow(engine: Engine, ticket: Ticket, view: View) -> Result:
    """Streams one answer to its view, and returns its result."""
    with sign_of_life() as status:
        while not ticket.done:
            engine.step()
            for new in ticket.ready():
                status.stop()
                view.show(new)
            if ticket.provisional is not None:
                view.propose(ticket.provisional)
    for new in ticket.ready():  # tokens that arrived while earlier prompts were shown
        view.show(new)
    return ticket.result()


def view_of(arguments: argparse.Namespace, loaded: Loaded, prompt: str) -> View:
    """Returns the view for the continuation of a prompt."""
    if arguments.json:
        return JsonView(loaded.need_tokenizer(), prompt)
    console = Console(highlight=False)
    if console.is_terminal and not console.no_color:
        loops = most_loops(loaded, arguments)
        return ColourView(console, loaded.need_tokenizer(), max_loops=loops, header=header(prompt, loops))
    several = len(arguments.prompt or ()) > 1 or arguments.samples > 1
    return PlainView(header=f"prompt: {prompt}\n" if several else "")


def _cancel(tickets: Sequence[Ticket]) -> None:
    """Cancels all requests."""
    for ticket in tickets:
        ticket.cancel()


def exit_status(results: Sequence[Result]) -> int:
    """Returns the exit status. Raises UserError if a request failed."""
    for result in results:
        if result.finish is Finish.FAILED:
            raise UserError(result.error)
    return 128 + signal.SIGINT if any(result.finish is Finish.CANCELLED for result in results) else 0


def _next_command(arguments: argparse.Namespace, policy: ExitPolicy, loaded: Loaded) -> str:
    """Returns the command for the same prompt with the other kind of exit, for comparison."""
    other = f"loops={loaded.model.config.loops}" if isinstance(policy, QExit) else "q=0.5"
    if arguments.prompt_file is not None:
        prompt = f"--prompt-file {pasted(arguments.prompt_file)}"
    else:
        prompt = " ".join(map(_prompt_flag, arguments.prompt))
    special = " --special-tokens" if arguments.special_tokens else ""
    return f"looplm generate {pasted(arguments.checkpoint)} {prompt}{special} --exit {other}"


def _prompt_flag(text: str) -> str:
    """Returns `--prompt` with its text; a text that starts with a dash needs an equals sign."""
    return f"--prompt{'=' if text.startswith('-') else ' '}{shlex.quote(text)}"
