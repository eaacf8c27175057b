"""A chat whose cache is kept between turns, so that only the new tokens of each turn are processed.

    chat = Conversation(engine, tokenizer, system="Be brief.")
    for new in chat.say("Why loops?", max_new_tokens=64):
        print(new.text, end="")

With a full cache and a fixed number of loops, the answers equal those to one prompt with all turns.
"""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence

from looplm_jax.convert._tokenizer_files import stop_ids
from looplm_jax.data._examples import ASSISTANT, Message, tokens_and_mask
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy
from looplm_jax.inference._engine import Engine
from looplm_jax.inference._field_checks import whole_number
from looplm_jax.inference._requests import NewToken, PrefixCache, Request, Result
from looplm_jax.inference._running import RequestHandle
from looplm_jax.inference._sampling import Sampling
from looplm_jax.inference._stopping import Finish

SYSTEM, USER = "system", "user"
_GREEDY = Sampling()


class Conversation:
    """A chat in ChatML (`data/chat.py`), answered by an engine one turn at a time.

    Each turn continues the prefix cache of the previous one, so only new tokens are processed:

        chat = Conversation(engine, tokenizer, system="Be brief.")
        for new in chat.say("Why loops?", max_new_tokens=64):
            print(new.text, end="")
        chat.messages, chat.result

    Several conversations may share an engine, and compile nothing beyond its programs. Each turn samples with its own
    random keys: `Sampling.index` counts the turns before it. For questions without history, use `Engine.generate`.

    Raises UserError for a tokenizer without the tokens of ChatML.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, system: str | None = None):
        self._engine, self._tokenizer = engine, tokenizer
        self._system = [] if system is None else [Message(SYSTEM, system)]
        # The same for every turn.
        self._opening, self._closing = _around_an_answer(tokenizer)
        self._stop_ids = tuple(stop_ids(tokenizer))
        self._handle: RequestHandle | None = None
        # One answer at a time: two would continue the same cache.
        self._answering = threading.Lock()
        self._forget()

    @property
    def messages(self) -> tuple[Message, ...]:
        """Returns all messages so far, the system message first."""
        return tuple(self._messages)

    @property
    def result(self) -> Result | None:
        """Returns the engine's last result; None before the first answer."""
        return self._result

    def reset(self) -> None:
        """Forgets everything except the system message. Raises UserError while an answer is being generated."""
        with self._alone():
            self._forget()

    def _forget(self) -> None:
        """Sets the state before the first turn."""
        self._messages = list(self._system)
        self._result: Result | None = None
        self._past: PrefixCache | None = None
        self._read = 0  # tokens in the cache
        # Read together with the first message.
        self._unread = self._tokens(self._system)

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int | None = None,
        policy: ExitPolicy | None = None,
        sampling: Sampling = _GREEDY,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        loops_per_token: float = math.inf,
        milliseconds_per_token: float = math.inf,
        client: str = "",
        on_token: Callable[[NewToken], None] | None = None,
    ) -> Iterator[NewToken]:
        """Yields the tokens of the answer as they arrive. Closing the iterator ends the answer and keeps its tokens.

        Args:
          text: the message of the user.
          max_new_tokens: the maximum number of tokens, further limited by the window; None: all that the window leaves.
          policy: decides the loop at which each token exits; None for the trained depth.
          sampling: as in `Engine.generate`. A repetition penalty covers all turns.
          stop_ids: tokens that end the answer; None for those that end a turn.
          stop_strings: strings that end the answer, and are not part of it.
          loops_per_token: a budget, as in `Engine.generate`.
          milliseconds_per_token: a budget of time, as in `Engine.generate`.
          client: a name. Clients take turns in the queue of the engine.
          on_token: called with every token as soon as it is fetched.

        Raises:
          UserError: the engine's window is full, the request cannot be served or fails, or another answer is not
            complete. The conversation then stays unchanged.
        """
        with self._alone():
            user = Message(USER, text)
            # What the cache lacks: the end of the last answer, the new message, and the start of the answer.
            prompt = [*self._unread, *self._tokens([user]), *self._opening]
            room = self._room(len(prompt))
            if max_new_tokens is not None:
                # At most what the window leaves, even if more is requested.
                room = min(whole_number("max_new_tokens", max_new_tokens, least=1), room)

            request = Request(
                prompt_ids=tuple(prompt),
                max_new_tokens=room,
                policy=policy,
                sampling=sampling,
                stop_ids=self._stop_ids if stop_ids is None else tuple(stop_ids),
                stop_strings=tuple(stop_strings),
                loops_per_token=loops_per_token,
                milliseconds_per_token=milliseconds_per_token,
                client=client,
                keep_cache=True,
                past=self._past,
                on_token=on_token,
            )
            yield from self._answer(user, request)

    def _answer(self, user: Message, request: Request) -> Iterator[NewToken]:
        """Yields the tokens of an answer, and records the turn."""
        # Random keys of their own, so that a repeated question may get another answer.
        turns = sum(message.role == USER for message in self._messages)
        request = dataclasses.replace(request, sampling=request.sampling.numbered(turns))
        self._handle = handle = self._engine.submit(request, wait=True)

        try:
            while not handle.done:
                self._engine.step()
                yield from handle.ready()
            yield from handle.ready()
            if handle.raised:
                raise handle.raised[0]
        finally:
            # After a break or an error as well, the engine has to finish the request before the cache can be kept.
            handle.cancel()
            while not handle.done:
                self._engine.step()
            if not handle.raised:
                self._take(user, handle.result())

    def stop(self) -> None:
        """Ends the running answer early. May be called from any thread, or from a signal handler."""
        if self._handle is not None:
            self._handle.cancel()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Excludes overlapping blocks, which would continue the same cache. Raises UserError if one is active."""
        if not self._answering.acquire(blocking=False):
            raise UserError("an answer is still being given; read it to its end, or close it, before the next turn")
        try:
            yield
        finally:
            self._answering.release()

    def _take(self, user: Message, result: Result) -> None:
        """Adds a turn, unless the engine never read it."""
        if result.finish is Finish.FAILED:
            raise UserError(result.error)
        self._result = result
        if result.cache is None:
            return

        self._messages += [user, Message(ASSISTANT, result.text)]
        self._past = result.cache

        # The last token was chosen but never read, so it is not in the cache.
        self._read += len(result.prompt_ids) + max(len(result.tokens) - 1, 0)
        # The cache lacks the last token. If that token ended the answer, the end of a turn takes its place.
        last = [token for token in result.tokens[-1:] if token not in self._stop_ids]
        self._unread = [*last, *self._closing]

    def _room(self, prompt: int) -> int:
        """Returns the tokens left for an answer. Raises UserError if there are none."""
        # The window counts everything that the cache will hold.
        room = self._engine.window - self._read - prompt
        if room < 1:
            raise UserError(
                f"the window of {self._engine.window} tokens is full: {self._read} of the conversation and {prompt} "
                "of this message leave none for an answer; reset the conversation, or give it a larger window"
            )
        return room

    def _tokens(self, messages: list[Message]) -> list[int]:
        """Returns the tokens of messages."""
        return tokens_and_mask(messages, self._tokenizer).tokens.tolist()


def _around_an_answer(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the tokens before and after the text of an assistant's message."""
    empty = tokens_and_mask([Message(ASSISTANT, "")], tokenizer).tokens.tolist()
    # <|im_start|> and the role; the rest closes the turn.
    size = 1 + len(tokenizer.encode(f"{ASSISTANT}\n"))
    return empty[:size], empty[size:]
