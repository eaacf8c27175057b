"""The work of `looplm generate`: loads the model, generates, and shows the text."""

import dataclasses
import math
import shlex
import signal
from collections.abc import Sequence

import jax
from rich.console import Console

from looplm_jax.cli._common import interrupt_calls
from looplm_jax.cli._generation import GenerationOptions, compiling_spinner, make_engine, max_loops, request_options
from looplm_jax.cli._views import ColorView, JsonView, PlainView, Stopwatch, View, header
from looplm_jax.convert._tokenizer_files import stop_ids
from looplm_jax.errors import UserError
from looplm_jax.files import quoted
from looplm_jax.halting import ExitPolicy, FixedLoops, QExit, parse_exit_policy
from looplm_jax.inference import (
    CacheStrategy,
    Engine,
    Finish,
    NewToken,
    Request,
    RequestHandle,
    Result,
    Sampling,
    Screening,
    SpeculativeResult,
    speculate,
)
from looplm_jax.inference._field_checks import whole_number
from looplm_jax.inference._kv_cache import bucket
from looplm_jax.loading import Loaded, load
from looplm_jax.models import LoopLM
from looplm_jax.models._blocks import unroll_layers
from looplm_jax.terminal import print_error, show

# By default, as far as the positions of the model allow.
_NEW_TOKENS = 128
# More prompts than this take turns, so that the cache stays small.
_MAX_SLOTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(GenerationOptions):
    """The options of `looplm generate`, as its flags give them."""

    # What is continued.
    prompt: Sequence[str] | None
    prompt_file: str | None
    special_tokens: bool
    max_new_tokens: int | None
    samples: int
    index: int

    # How it is generated and shown.
    draft_loops: int | None
    drafts: int
    revise: bool
    json: bool


def generate_texts(prompts: Sequence[str], options: GenerateOptions) -> int:
    """Continues the prompts, and shows each text while it grows. Returns the exit status."""
    fields = request_options(options)
    # From here on `prompts` has one entry per sample.
    sampling, prompts = _repeated(fields.pop("sampling"), prompts, options)

    loaded = load(options.checkpoint, step=options.step, dtype=options.dtype)
    count, stops = options.max_new_tokens, tuple(stop_ids(loaded.need_tokenizer()))

    # Each text has its own clock, which starts with its first token.
    clocks = [Stopwatch() for _ in prompts]
    requests = [
        _request(
            loaded,
            prompt,
            count,
            options.special_tokens,
            sampling=own,
            stop_ids=stops,
            on_token=clock.tick,
            **fields,
        )
        for prompt, own, clock in zip(prompts, sampling, clocks, strict=True)
    ]

    # The number of slots and the window fit these requests, because nothing else will use the engine.
    engine = make_engine(
        loaded,
        options,
        window=_window(loaded, requests),
        slots=min(len(requests), _MAX_SLOTS),
        queue=len(requests),
        previews=options.revise,
    )

    # All are submitted at once and decoded together; the first is shown while it grows, the others after it.
    handles = [engine.submit(request) for request in requests]
    # Canceled requests still have results, so the texts so far are shown.
    with interrupt_calls(lambda: _cancel(handles)):
        for prompt, handle, clock in zip(prompts, handles, clocks, strict=True):
            view = _view(options, loaded, prompt)
            view.finish(_follow(engine, handle, view), clock.rate)

    status = _exit_status([handle.result() for handle in handles])
    if status == 0 and not options.json:
        show(f"next: {_next_command(options, fields['policy'], loaded)}")
    return status


# From prompts to requests


def _repeated(sampling: Sampling, prompts: Sequence[str], options: GenerateOptions) -> tuple[list[Sampling], list[str]]:
    """Returns each prompt `--samples` times, with its own random keys.

    Raises UserError if the samples of a prompt would be equal.
    """
    samples = whole_number("--samples", options.samples, least=1)
    if samples > 1 and sampling.temperature == 0:
        raise UserError("--samples needs --temperature above 0, such as 1: greedy texts are all the same")

    first = dataclasses.replace(sampling, index=options.index)
    numbered = [first.numbered(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    return numbered, [prompt for prompt in prompts for _ in range(samples)]


def _request(loaded: Loaded, prompt: str, count: int | None, special: bool, **options: object) -> Request:
    """Returns the request for one prompt."""
    tokenizer = loaded.need_tokenizer()
    prompt_ids = (tokenizer.bos_id, *tokenizer.encode(prompt, special=special))
    # The prompt starts with a bos token, as the documents of training do.
    count = _new_tokens(loaded, len(prompt_ids), count)
    return Request(prompt_ids=prompt_ids, max_new_tokens=count, **options)  # type: ignore[arg-type]


def _new_tokens(loaded: Loaded, prompt_tokens: int, wanted: int | None) -> int:
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


def _follow(engine: Engine, handle: RequestHandle, view: View) -> Result:
    """Streams one answer to its view, and returns its result."""
    with compiling_spinner() as status:
        while not handle.done:
            engine.step()
            for new in handle.ready():
                status.stop()
                view.show(new)
            if handle.provisional is not None:
                view.propose(handle.provisional)
    for new in handle.ready():  # tokens that arrived while earlier prompts were shown
        view.show(new)
    return handle.result()


def _view(options: GenerateOptions, loaded: Loaded, prompt: str) -> View:
    """Returns the view for the continuation of a prompt."""
    if options.json:
        return JsonView(loaded.need_tokenizer(), prompt)
    console = Console(highlight=False)
    if console.is_terminal and not console.no_color:
        loops = max_loops(loaded, options)
        return ColorView(console, loaded.need_tokenizer(), max_loops=loops, header=header(prompt, loops))
    several = len(options.prompt or ()) > 1 or options.samples > 1
    return PlainView(header=f"prompt: {prompt}\n" if several else "")


def _cancel(handles: Sequence[RequestHandle]) -> None:
    """Cancels all requests."""
    for handle in handles:
        handle.cancel()


def _exit_status(results: Sequence[Result]) -> int:
    """Returns the exit status. Raises UserError if a request failed."""
    for result in results:
        if result.finish is Finish.FAILED:
            raise UserError(result.error)
    return 128 + signal.SIGINT if any(result.finish is Finish.CANCELLED for result in results) else 0


def _next_command(options: GenerateOptions, policy: ExitPolicy, loaded: Loaded) -> str:
    """Returns the command for the same prompt with the other kind of exit, for comparison."""
    # The trained depth against the gate: the comparison that shows what early exit saves.
    other = f"loops={loaded.model.config.loops}" if isinstance(policy, QExit) else "q=0.5"
    if options.prompt_file is not None:
        prompt = f"--prompt-file {quoted(options.prompt_file)}"
    else:
        prompt = " ".join(map(_prompt_flag, options.prompt or ()))
    special = " --special-tokens" if options.special_tokens else ""
    return f"looplm generate {quoted(options.checkpoint)} {prompt}{special} --exit {other}"


def _prompt_flag(text: str) -> str:
    """Returns `--prompt` with its text; a text that starts with a dash needs an equals sign."""
    return f"--prompt{'=' if text.startswith('-') else ' '}{shlex.quote(text)}"


# Speculation


def speculate_texts(prompts: Sequence[str], options: GenerateOptions) -> int:
    """Continues the prompts with a fixed number of loops, drafted by fewer. Returns the exit status.

    The first text is streamed; the others, which are generated at the same time, are shown after it.
    """
    assert options.draft_loops is not None
    loops = _verifying_loops(options)
    fields = request_options(options)
    samplings, prompts = _repeated(fields["sampling"], prompts, options)
    loaded = load(options.checkpoint, step=options.step, dtype=options.dtype)
    for warning in loaded.warnings:
        print_error(str(warning))

    first = _view(options, loaded, prompts[0])
    texts, clocks, stopped = [list[NewToken]() for _ in prompts], [Stopwatch() for _ in prompts], list[bool]()
    with compiling_spinner() as status, interrupt_calls(lambda: stopped.append(True)):

        def show_token(row: int, new: NewToken) -> None:
            texts[row].append(new)
            clocks[row].tick(new)
            if row == 0:
                status.stop()
                first.show(new)

        results = speculate(
            # model and parameters
            *_unrolled(loaded),
            _encoded(loaded, prompts, options),
            draft_loops=options.draft_loops,
            drafts=options.drafts,
            max_new_tokens=_count(loaded, prompts, options),
            loops=loops,
            sampling=samplings,
            stop_ids=tuple(stop_ids(loaded.need_tokenizer())),
            stop_strings=fields["stop_strings"],
            tokenizer=loaded.need_tokenizer(),
            on_token=show_token,
            # Screening is the only point at which a running batch can be stopped.
            screen=lambda *_: Screening.STOP if stopped else Screening.CONTINUE,
        )

    # The first text has been shown already.
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        view = _view(options, loaded, prompt) if number else first
        for new in texts[number] if number else ():
            view.show(new)
        view.finish(_as_result(result), clocks[number].rate)
        if not options.json:
            print(_cost(result))
    return _exit_status([_as_result(result) for result in results])


def _verifying_loops(options: GenerateOptions) -> int:
    """Returns the loops that verify. Raises UserError for flags that cannot be combined with drafts."""
    policy = parse_exit_policy(options.exit)
    if not isinstance(policy, FixedLoops):
        raise UserError("--draft-loops drafts for a fixed number of loops; add for example --exit loops=4")
    if options.cache != CacheStrategy.FULL:
        raise UserError("--draft-loops needs --cache full: each loop reads keys and values of its own")

    # Its texts have a fixed number of loops per token and no provisional tokens, so these flags would have no effect.
    others = {
        "--revise": options.revise,
        "--loops-per-token": options.loops_per_token < math.inf,
        "--ms-per-token": options.ms_per_token < math.inf,
    }

    for flag, given in others.items():
        if given:
            raise UserError(f"{flag} cannot be combined with --draft-loops; leave one of them out")
    return policy.loops


def _unrolled(loaded: Loaded) -> tuple[LoopLM, dict]:
    """Returns the model and its parameters, on a CPU with one array per layer, which is faster there."""
    if jax.default_backend() != "cpu":
        return loaded.model, loaded.params
    # A scan over layers would copy the weights of each layer before it multiplies by them.
    return LoopLM(loaded.model.config, loaded.model.compute, unrolled=True), unroll_layers(loaded.params)


def _encoded(loaded: Loaded, prompts: Sequence[str], options: GenerateOptions) -> list[list[int]]:
    """Returns the ids of each prompt, after a bos token."""
    tokenizer, special = loaded.need_tokenizer(), options.special_tokens
    return [[tokenizer.bos_id, *tokenizer.encode(prompt, special=special)] for prompt in prompts]


def _count(loaded: Loaded, prompts: Sequence[str], options: GenerateOptions) -> int:
    """Returns the new tokens per text: the requested number, or what the longest prompt leaves room for."""
    longest = max(map(len, _encoded(loaded, prompts, options)))
    return _new_tokens(loaded, longest, options.max_new_tokens)


def _as_result(result: SpeculativeResult) -> Result:
    """Returns the result in the form that the views show. Only Ctrl-C screens a text here."""
    return Result(
        prompt_ids=result.prompt_ids,
        tokens=result.tokens,
        exit_loops=(result.loops,) * len(result.tokens),
        log_probs=result.log_probs,
        text=result.text,
        finish=Finish.CANCELLED if result.screened else result.finish,
        error=result.error,
        sampling=result.sampling,
    )


def _cost(result: SpeculativeResult) -> str:
    """Returns the cost of a text as a line."""
    return (
        f"{result.accepted} of {result.drafted} drafts accepted; "
        f"{result.loops_per_token:.2f} passes of the stack a token instead of {result.loops}"
    )
