"""What `looplm generate` does once its arguments are read: load, generate, show."""

import argparse
import shlex
import sys

from rich.console import Console

from looplm_jax.cli.generation_views import ColourView, JsonView, PlainView, View
from looplm_jax.halting import ExitPolicy, QExit, parse_exit_policy
from looplm_jax.inference import NewToken, Result, Sampling, generate
from looplm_jax.inference.text_stream import TextStream
from looplm_jax.loading import Loaded, load

_NEW_TOKENS = 128


def run_generation(prompt: str, arguments: argparse.Namespace) -> int:
    """Generate as the arguments of `looplm generate` say. Returns the exit status."""
    policy = parse_exit_policy(arguments.exit)
    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
    )
    loaded = load(arguments.checkpoint, step=arguments.step)
    for warning in loaded.warnings:
        print(f"looplm: {warning}", file=sys.stderr)
    prompt_ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(prompt)]
    view = _view(arguments, loaded, prompt, prompt_ids, policy)
    view.finish(_generate(loaded, prompt_ids, arguments.max_new_tokens, policy, sampling, view))
    if not arguments.json:
        print(f"next: {_next_command(arguments, policy, loaded)}")
    return 0


def _generate(
    loaded: Loaded, prompt_ids: list[int], count: int | None, policy: ExitPolicy, sampling: Sampling, view: View
) -> Result:
    """Generate into a view, with a sign of life on a terminal until the first token is there."""
    with Console(stderr=True).status("compiling for this length of prompt") as status:

        def show(new: NewToken) -> None:
            status.stop()
            view.show(new)

        return generate(
            loaded.model,
            loaded.params,
            prompt_ids,
            max_new_tokens=_room(loaded, prompt_ids) if count is None else count,
            policy=policy,
            sampling=sampling,
            stop_ids=_stop_ids(loaded),
            on_token=show,
        )


def _view(
    arguments: argparse.Namespace, loaded: Loaded, prompt: str, prompt_ids: list[int], policy: ExitPolicy
) -> View:
    if arguments.json:
        return JsonView(loaded.tokenizer)
    stream = TextStream(loaded.tokenizer, prompt_ids)
    console = Console(highlight=False)
    if console.is_terminal and not console.no_color:
        return ColourView(console, stream, prompt, max_loops=policy.max_loops or loaded.model.config.loops)
    return PlainView(stream)


def _room(loaded: Loaded, prompt_ids: list[int]) -> int:
    room = loaded.model.config.max_positions - len(prompt_ids)
    return min(_NEW_TOKENS, room) if room > 0 else _NEW_TOKENS


def _stop_ids(loaded: Loaded) -> set[int]:
    """The end of a document, and of a turn where the tokeniser knows chat."""
    from looplm_jax.data.tokenizers import IM_END

    return {loaded.tokenizer.eos_id, loaded.tokenizer.token_id(IM_END)} - {None}  # type: ignore[return-value]


def _next_command(arguments: argparse.Namespace, policy: ExitPolicy, loaded: Loaded) -> str:
    """The same prompt by the other kind of exit, to compare."""
    other = f"loops={loaded.model.config.loops}" if isinstance(policy, QExit) else "q=0.5"
    if arguments.prompt_file is not None:
        prompt = f"--prompt-file {shlex.quote(arguments.prompt_file)}"
    else:
        prompt = f"--prompt {shlex.quote(arguments.prompt)}"
    return f"looplm generate {shlex.quote(arguments.checkpoint)} {prompt} --exit {other}"
