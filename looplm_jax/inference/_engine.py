"""The engine: requests join and leave at any tick, and every pass of the shared stack serves all of them."""

import collections
import contextlib
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy
from looplm_jax.inference._decoder import Decoder
from looplm_jax.inference._deferred_signals import deferred_signals
from looplm_jax.inference._engine_config import EngineConfig, EngineStats
from looplm_jax.inference._field_checks import token_ids, whole_number
from looplm_jax.inference._kv_cache import bucket
from looplm_jax.inference._request_checks import Prompt, check_request, make_requests, usable_ids
from looplm_jax.inference._requests import NewToken, PrefixCache, Request, Result
from looplm_jax.inference._running import RequestHandle
from looplm_jax.inference._sampling import Sampling
from looplm_jax.inference._saved_programs import SavedPrograms
from looplm_jax.inference._scheduler import Scheduler
from looplm_jax.inference._stopping import Finish
from looplm_jax.models._looplm import LoopLM, Params

_GREEDY = Sampling()
_LONGEST_CHUNK = 512


class Engine:
    """Generates text for many requests at once, each token with as many loops as its exit policy asks for.

    The engine has a fixed number of slots. A request gets a slot when its prompt has been read, and leaves it with its
    last token. Every pass of the shared stack serves all slots, at whatever loop their tokens are (continuous depth
    batching).

        engine = Engine(model, params, tokenizer)
        results = engine.generate(["Once", "def main("], max_new_tokens=64, policy=QExit(q=0.5))

        for new in engine.stream("Once", max_new_tokens=64):
            print(new.text, end="")

    What to use when:

    * `generate` waits for all results; `stream` yields the tokens of one answer.
    * For a server: `with engine.serving():` steps the engine in a thread, and `submit` returns a `RequestHandle` at
      once. Methods may be called from any thread.
    * For a chat, `Conversation` keeps the cache between turns. For drafts that the same model verifies, `speculate`.
      For one prompt without an engine, the function `generate`.

    What compiles: programs depend on the model and the `EngineConfig`, on lengths of prompts only through few buckets.
    Other requests compile nothing, with three exceptions, which recompile once: the first policy of a new class, every
    new `Custom` policy, and the first repetition penalty. Create the engine once, and reuse it.

    An error in one request (a callback that raises, logits that are not finite) ends that request, with
    `Finish.FAILED`. An error that loses the cache ends the requests in the slots; those in the queue are served.
    Signals are deferred to the end of a step, so that after an interrupt the engine still works.

    Attributes:
      config: the size of the engine, fitted to the positions of the model.
      stats: counters of its work.
    """

    def __init__(
        self,
        model: LoopLM,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        config: EngineConfig | None = None,
        mesh: Mesh | None = None,
        programs: Path | None = None,
    ):
        """Allocates the cache, and compiles nothing yet.

        Args:
          model: the network.
          params: its parameters. On a mesh, they have their shardings already.
          tokenizer: needed for prompts that are text, for the text of results, and for stop strings.
          config: the size of the engine.
          mesh: the devices among which weights, and heads of the cache, are sharded; None for one device.
          programs: a folder that keeps traced programs, which another process then need not trace; None keeps none.
            Only its owner may be able to write to it, because its programs are executed. It has no effect on a mesh.
        """
        self.config = (config or EngineConfig()).fitted(model.config.max_positions)
        self.stats = EngineStats()
        self._tokenizer = tokenizer
        self._model_config = model.config
        self._mesh = mesh
        self._shapes = jax.tree.map(jnp.shape, params)
        saved = None if programs is None or mesh is not None else SavedPrograms(programs)
        usable = usable_ids(model.config, tokenizer)
        self._decoder = Decoder(model, params, self.config, mesh, usable=usable, programs=saved)
        self._scheduler = Scheduler(self._decoder, tokenizer, self.config, self.stats)
        self._stepping = False
        # Reentrant, because `on_token` runs during a step and may submit further requests.
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)

    def use(self, params: Params) -> None:
        """Replaces the parameters, for example after a step of training. Nothing compiles again.

        Prefix caches of earlier results belong to the earlier parameters.

        Raises:
          UserError: requests are running or waiting, or an array has another shape.
        """
        with self._lock:
            if self._scheduler.busy:
                raise UserError("requests are running with the present parameters; wait for their results first")
            shapes = jax.tree.map(jnp.shape, params)
            if shapes != self._shapes:
                raise UserError("these parameters are those of another model; create an engine for it")
            self._decoder.use(params)

    @property
    def cache_bytes(self) -> int:
        """The bytes of the cache of all slots."""
        return self._decoder.cache_bytes

    @property
    def window(self) -> int:
        """The number of tokens that a request may have, prompt and text together."""
        return min(self.config.capacity, self._model_config.max_positions)

    # Generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int,
        samples: int = 1,
        policy: ExitPolicy | None = None,
        sampling: Sampling = _GREEDY,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        loops_per_token: float = math.inf,
        milliseconds_per_token: float = math.inf,
        client: str = "",
        keep_cache: bool = False,
        past: PrefixCache | None = None,
        on_token: Callable[[NewToken], None] | None = None,
    ) -> list[Result]:
        """Returns the results of all prompts, in their order. There may be more prompts than the queue has room for.

        Every result has its own random keys: prompt i draws with `Sampling.index` i, and its sample j with `sample` j,
        counted from those in `sampling`. A result's own `sampling` therefore reproduces it in any other call.

        Args:
          prompts: texts, or lists of token ids; a single text, or a single list of ids, is one prompt.
          max_new_tokens: the maximum number of tokens after each prompt.
          samples: the number of results per prompt. Sample j of prompt i is result `i * samples + j`.
          policy: decides the loop at which each token exits; None for the trained depth.
          sampling: temperature, filters, penalty and seed; greedy by default.
          stop_ids: tokens that end the text; the last token is then one of them.
          stop_strings: strings that end the text, and are not part of it. They need a tokenizer.
          loops_per_token: a budget: the maximum mean of loops over the new tokens after the first.
          milliseconds_per_token: a budget of time. Loops are reduced to meet it.
          client: a name. Clients take turns in the queue.
          keep_cache: whether `Result.cache` keeps the cache, so that another request can continue it.
          past: the prefix cache of an earlier result that each prompt continues.
          on_token: called with every token as soon as it is fetched, of any of the prompts.

        Raises:
          UserError: a prompt or an option is invalid; nothing has been started.
        """
        requests = self.requests(
            prompts,
            max_new_tokens=max_new_tokens,
            samples=samples,
            policy=policy,
            sampling=sampling,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            loops_per_token=loops_per_token,
            milliseconds_per_token=milliseconds_per_token,
            client=client,
            keep_cache=keep_cache,
            past=past,
            on_token=on_token,
        )

        raised: list[BaseException] = []
        # Cancelling only appends to a deque, which is atomic, so that any thread may cancel without the lock of the
        # engine.
        handles = [RequestHandle(request, self._scheduler.cancelled.append, raised) for request in requests]
        waiting, unfinished = collections.deque(handles), collections.deque(handles)

        try:
            while unfinished:
                # There may be more prompts than the queue has room for: the rest follow as it empties.
                while waiting and self._enqueue(waiting[0]):
                    waiting.popleft()
                self.step()
                # Only finished handles at the front are removed, so each one is looked at a constant number of times.
                while unfinished and unfinished[0].done:
                    unfinished.popleft()
                if raised:  # tested last, because a callback raises before its request is done
                    raise raised[0]
        finally:
            # After an interrupt, the remaining results are not needed.
            for handle in handles:
                handle.cancel()

        return [handle.result() for handle in handles]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        policy: ExitPolicy | None = None,
        sampling: Sampling = _GREEDY,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        loops_per_token: float = math.inf,
        milliseconds_per_token: float = math.inf,
        client: str = "",
        past: PrefixCache | None = None,
        on_token: Callable[[NewToken], None] | None = None,
    ) -> Iterator[NewToken]:
        """Yields the tokens of one result as they arrive. Closing the iterator cancels the request.

        Arguments as in `generate`; for a result with its cache, use `submit`.

        Raises:
          UserError: the prompt or an option is invalid, or the request failed.
        """
        (request,) = self.requests(
            [prompt],
            max_new_tokens=max_new_tokens,
            policy=policy,
            sampling=sampling,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            loops_per_token=loops_per_token,
            milliseconds_per_token=milliseconds_per_token,
            client=client,
            past=past,
            on_token=on_token,
        )
        # Waits for room in the queue, because a caller that iterates cannot try again.
        handle = self.submit(request, wait=True)

        try:
            while not handle.done:
                self.step()
                yield from handle.ready()
            # The last step may have delivered several tokens, one per tick.
            yield from handle.ready()
            if handle.raised:
                raise handle.raised[0]
            if handle.result().finish is Finish.FAILED:
                raise UserError(handle.result().error)
        finally:
            handle.cancel()

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int,
        samples: int = 1,
        policy: ExitPolicy | None = None,
        sampling: Sampling = _GREEDY,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        loops_per_token: float = math.inf,
        milliseconds_per_token: float = math.inf,
        client: str = "",
        keep_cache: bool = False,
        past: PrefixCache | None = None,
        on_token: Callable[[NewToken], None] | None = None,
    ) -> list[Request]:
        """Returns requests for `submit`. Arguments and errors as in `generate`."""
        requests = make_requests(
            prompts,
            self._tokenizer,
            samples=samples,
            max_new_tokens=max_new_tokens,
            policy=policy,
            sampling=sampling,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            loops_per_token=loops_per_token,
            milliseconds_per_token=milliseconds_per_token,
            client=client,
            keep_cache=keep_cache,
            past=past,
            on_token=on_token,
        )

        # Everything is checked before anything is started, so that an invalid prompt leaves no others half done.
        for request in requests:
            self._check(request)
        return requests

    # Requests

    def submit(self, request: Request, *, wait: bool = False) -> RequestHandle:
        """Adds a request to the queue. Returns a handle to wait for its result, to stream its tokens or to cancel it.

        Args:
          request: the prompt and its options; see `requests`.
          wait: whether to step the engine until the queue has room, instead of raising.

        Raises:
          UserError: the request can never be served, or the queue is full.
        """
        self._check(request)
        handle = RequestHandle(request, self._scheduler.cancelled.append)

        try:
            while not self._enqueue(handle):
                if not wait:
                    # The caller decides how to wait; a server would answer 429 here.
                    raise UserError(f"{self.config.queue} requests are waiting; try again when some are answered")
                self.step()
        except BaseException:
            handle.cancel()  # an interrupt may arrive after the request was added
            raise
        return handle

    def step(self) -> bool:
        """Prefills about a chunk of prompts and runs one tick. Returns False if there is no work left."""
        with deferred_signals, self._lock:
            if self._stepping:
                # The lock is reentrant, so this needs a flag of its own: a nested step would see slots in the middle of
                # a change.
                raise UserError("on_token cannot step the engine that calls it; submit a request instead")
            self._stepping = True
            try:
                self._scheduler.step()
            except BaseException as error:
                # The slots may have been donated to a program that failed, so the state before the step cannot be
                # recovered.
                self._scheduler.start_over(error)
                # KeyboardInterrupt and SystemExit reach the caller; an Exception has been delivered to the requests it
                # ended.
                if not isinstance(error, Exception):
                    raise
            finally:
                self._stepping = False
            return self._scheduler.busy

    @contextlib.contextmanager
    def serving(self) -> Iterator["Engine"]:
        """Steps the engine in a thread while the block runs. Requests that are unfinished at its end are cancelled."""
        stopping = threading.Event()
        # A daemon, so that the interpreter can exit even if the block is never left.
        thread = threading.Thread(target=self._serve, args=(stopping,), name="looplm-engine", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            with deferred_signals, self._lock:
                stopping.set()
                self._work.notify_all()
            thread.join()

    def _serve(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set():
                if not self.step():
                    self._wait_for_work(stopping)
            with self._lock:
                # The loop has ended, so nothing would finish the remaining requests.
                self._scheduler.cancel_all()
        except BaseException as error:  # no caller may wait forever
            with self._lock:
                self._scheduler.stop(error)

    def _wait_for_work(self, stopping: threading.Event) -> None:
        with self._lock:
            # Tested under the lock, because a request may have arrived since the last step.
            if not self._scheduler.num_waiting and not stopping.is_set():
                self._work.wait()

    def _check(self, request: Request) -> None:
        check_request(request, self._model_config, self.config, self._tokenizer, self._mesh)

    def _enqueue(self, handle: RequestHandle) -> bool:
        """Adds a request to the queue. Returns False if there is no room. Raises UserError for a stopped engine."""
        with deferred_signals, self._lock:
            # During a step, the scheduler drops cancelled requests itself.
            if self._scheduler.queue_full and not self._stepping:
                self._scheduler.drop_cancelled()
            added = self._scheduler.enqueue(handle)
            # Wakes the thread of `serving`, which sleeps while there is no work.
            self._work.notify()
        return added


def generate(
    model: LoopLM,
    params: Params,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    policy: ExitPolicy,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    on_token: Callable[[NewToken], None] | None = None,
) -> Result:
    """Continues one prompt with a full cache, by an engine with one slot.

    Programs are compiled for buckets of lengths, not for each length. Other settings of a policy or of `sampling`
    compile nothing, unless they need more loops than `config.loops` or are of another kind.

    Args:
      model: the network.
      params: its parameters.
      prompt_ids: at least one token.
      max_new_tokens: at least 1; a stop token may end the text earlier.
      policy: decides the loop at which each token exits; it may use more loops than the trained depth.
      sampling: greedy by default.
      stop_ids: tokens that end the generation.
      on_token: called with every token as soon as it is chosen.

    Raises:
      UserError: the prompt is empty, an id is outside the vocabulary, or the model has too few positions.
    """
    longest, prompt_ids = model.config.max_positions, token_ids("prompt_ids", prompt_ids)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    if not isinstance(policy, ExitPolicy) or isinstance(policy, type):
        raise UserError(f"policy must be an exit policy, such as QExit(q=0.5), not {policy!r}")

    config = EngineConfig(
        slots=1,
        capacity=bucket(min(max(len(prompt_ids) + max_new_tokens, 1), longest), longest),
        # More planes than the trained depth only if the policy uses them.
        loops=max(model.config.loops, policy.max_loops or 0),
        chunk=min(_LONGEST_CHUNK, longest),
        unroll=False,
    )

    return Engine(model, params, config=config).generate(
        [prompt_ids],
        max_new_tokens=max_new_tokens,
        policy=policy,
        sampling=sampling or Sampling(),
        stop_ids=tuple(stop_ids),
        on_token=on_token,
    )[0]
