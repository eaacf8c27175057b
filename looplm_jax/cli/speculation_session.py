"""Runs `looplm generate --draft-loops`: tokens of a fixed number of loops, drafted by fewer loops."""

import argparse
import math
from collections.abc import Sequence

import jax

from looplm_jax.cli import generation_session
from looplm_jax.cli.engine_session import request_options, sign_of_life
from looplm_jax.cli.generation_views import Stopwatch
from looplm_jax.cli.interrupts import interrupt_calls
from looplm_jax.convert._tokenizer_files import stop_ids
from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops, parse_exit_policy
from looplm_jax.inference import Finish, NewToken, Result, Screening, SpeculativeResult, speculate
from looplm_jax.loading import Loaded
from looplm_jax.models.blocks import unroll_layers
from looplm_jax.models.looplm import LoopLM
from looplm_jax.printing import complain


def run_speculation(prompts: Sequence[str], arguments: argparse.Namespace) -> int:
    """Runs `looplm generate --draft-loops` with its arguments. Returns the exit status.

    The first text is streamed; the others, which are generated at the same time, are shown after it.
    """
    loops = _loops(arguments)
    options = request_options(arguments)
    samplings, prompts = generation_session.repeated(options["sampling"], prompts, arguments)
    loaded = generation_session.load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype)
    for warning in loaded.warnings:
        complain(str(warning))

    first = generation_session.view_of(arguments, loaded, prompts[0])
    told, clocks, stopped = [list[NewToken]() for _ in prompts], [Stopwatch() for _ in prompts], list[bool]()
    with sign_of_life() as status, interrupt_calls(lambda: stopped.append(True)):

        def give(row: int, new: NewToken) -> None:
            told[row].append(new)
            clocks[row].tick(new)
            if row == 0:
                status.stop()
                first.show(new)

        results = speculate(
            # model and parameters
            *_unrolled(loaded),
            _encoded(loaded, prompts, arguments),
            draft_loops=arguments.draft_loops,
            drafts=arguments.drafts,
            max_new_tokens=_count(loaded, prompts, arguments),
            loops=loops,
            sampling=samplings,
            stop_ids=tuple(stop_ids(loaded.need_tokenizer())),
            stop_strings=options["stop_strings"],
            tokenizer=loaded.need_tokenizer(),
            on_token=give,
            # Screening is the only point at which a running batch can be stopped.
            screen=lambda *_: Screening.STOP if stopped else Screening.CONTINUE,
        )

    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        view = generation_session.view_of(arguments, loaded, prompt) if number else first
        for new in told[number] if number else ():
            view.show(new)
        view.finish(_as_result(result), clocks[number].rate)
        if not arguments.json:
            print(_cost(result))
    return generation_session.exit_status([_as_result(result) for result in results])


def _loops(arguments: argparse.Namespace) -> int:
    """Returns the loops that verify. Raises UserError for flags that cannot be combined with drafts."""
    policy = parse_exit_policy(arguments.exit)
    if not isinstance(policy, FixedLoops):
        raise UserError("--draft-loops drafts for a fixed number of loops; add for example --exit loops=4")
    if arguments.cache != "full":
        raise UserError("--draft-loops needs --cache full: each loop reads keys and values of its own")

    others = {
        "--revise": arguments.revise,
        "--loops-per-token": arguments.loops_per_token < math.inf,
        "--ms-per-token": arguments.ms_per_token < math.inf,
    }

    for flag, given in others.items():
        if given:
            raise UserError(f"{flag} does not go with --draft-loops; leave one of them out")
    return policy.loops


def _unrolled(loaded: Loaded) -> tuple[LoopLM, dict]:
    """Returns the model and its parameters, on a CPU with one array per layer, which is faster there."""
    if jax.default_backend() != "cpu":
        return loaded.model, loaded.params
    return LoopLM(loaded.model.config, loaded.model.compute, unrolled=True), unroll_layers(loaded.params)


def _encoded(loaded: Loaded, prompts: Sequence[str], arguments: argparse.Namespace) -> list[list[int]]:
    """Returns the ids of each prompt, after a bos token."""
    tokenizer, special = loaded.need_tokenizer(), arguments.special_tokens
    return [[tokenizer.bos_id, *tokenizer.encode(prompt, special=special)] for prompt in prompts]


def _count(loaded: Loaded, prompts: Sequence[str], arguments: argparse.Namespace) -> int:
    """Returns the new tokens per text: the requested number, or what the longest prompt leaves room for."""
    longest = max(map(len, _encoded(loaded, prompts, arguments)))
    return generation_session.new_tokens(loaded, longest, arguments.max_new_tokens)


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
