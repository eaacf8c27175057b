"""The scheduler of an engine: which prompts are prefilled, which slots they get, and to whom the results of a tick go.

A step prefills about a chunk of prompt tokens and then runs one tick, so that a long prompt delays no running request,
and short prompts are prefilled together. The results of a tick are fetched while the next one runs.
"""

import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

import jax

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference._decoder import Decoder, PolicyError, PrefillTask
from looplm_jax.inference._engine_config import EngineConfig, EngineStats
from looplm_jax.inference._running import RequestError, RequestHandle, RunningRequest, described
from looplm_jax.inference._stopping import Finish
from looplm_jax.inference._tick import Ticked

_log = logging.getLogger(__name__)

T = TypeVar("T", bound=Hashable)


# The queue


class FairQueue(Generic[T]):
    """A queue that is first in, first out per client, and alternates between clients.

    Every operation takes constant time, regardless of the number of items.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._size = 0
        # A dictionary keeps its order and deletes any key in constant time; the values are unused.
        self._waiting: collections.OrderedDict[str, collections.OrderedDict[T, None]] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether `push` would raise."""
        return self._size >= self._limit

    def push(self, client: str, item: T) -> None:
        """Adds an item that is not in the queue. Raises OverflowError if the queue is full."""
        if self.full:
            raise OverflowError(f"{self._limit} items are waiting")
        self._waiting.setdefault(client, collections.OrderedDict())[item] = None
        self._size += 1

    def first(self) -> T:
        """Returns the item that `pop` would return, without removing it. Raises IndexError if the queue is empty."""
        if not self._waiting:
            raise IndexError("nothing waits")
        return next(iter(next(iter(self._waiting.values()))))

    def pop(self) -> T:
        """Removes and returns the oldest item of the next client. Raises IndexError if the queue is empty."""
        if not self._waiting:
            raise IndexError("nothing waits")

        client, items = self._waiting.popitem(last=False)
        item, _ = items.popitem(last=False)
        self._size -= 1
        if items:
            self._waiting[client] = items  # after the other clients

        return item

    def discard(self, client: str, item: T) -> bool:
        """Removes an item of a client; the others keep their order. Returns whether the item was in the queue."""
        items = self._waiting.get(client)
        if items is None or item not in items:
            return False

        del items[item]
        self._size -= 1
        # A client without items must not get a turn.
        if not items:
            del self._waiting[client]
        return True


# Steps


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """A program whose results were not fetched yet, and the requests that were in the slots when it started.

    It is a tick, or the program that chose the first tokens of the slots `firsts`.
    """

    ticked: Ticked
    owners: tuple[RunningRequest | None, ...]
    firsts: tuple[int, ...] = ()


class Scheduler:
    """The queue, the slots and the decoder of an engine. Its caller makes sure that no two threads use it at once.

    An error in one request ends that request. An error that loses the cache ends the requests in the slots; those in
    the queue are served.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer | None, config: EngineConfig, stats: EngineStats):
        self.stopped = ""  # why no request is served any more; empty while the engine works
        self.cancelled: collections.deque[RequestHandle] = collections.deque()  # not processed yet
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._config = config
        self._stats = stats
        self._queue: FairQueue[RequestHandle] = FairQueue(config.queue)
        self._slots: list[RunningRequest | None] = [None] * config.slots
        self._prefill: tuple[RequestHandle, PrefillTask] | None = None  # the prompt that is prefilled in chunks
        self._pack: dict[int, PrefillTask] = {}  # prompts that will be prefilled together, by slot
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._last_fetch = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is work left."""
        return bool(self._in_flight or any(self._slots) or self._prefill or len(self._queue))

    @property
    def num_waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self._queue)

    @property
    def queue_full(self) -> bool:
        """Whether `enqueue` would return False."""
        return self._queue.full

    def enqueue(self, handle: RequestHandle) -> bool:
        """Adds a request to the queue. Returns False if there is no room. Raises UserError for a stopped engine."""
        if self.stopped:
            raise UserError(self.stopped)
        if handle.cancelled:
            self._end_unstarted(handle, Finish.CANCELLED)
        elif self._queue.full:
            return False
        else:
            self._queue.push(handle.request.client, handle)
        return True

    def step(self) -> None:
        """Prefills about a chunk of prompt tokens, runs one tick, and delivers the results of the previous one."""
        self.drop_cancelled()
        before = len(self._in_flight)
        self._prefill_chunk_of_prompts()
        if any(owner is not None and owner.needs_ticks for owner in self._slots):
            self._in_flight.append(_InFlight(self._decoder.tick(), tuple(self._slots)))
            # A program may run several ticks, so that they share the cost of one dispatch from Python.
            self._stats.ticks += self._config.ticks

        # The results of the last program are fetched in the next step, while the programs of that step run.
        started = len(self._in_flight) > before
        # Fetching waits for the program, so the latest one stays in flight, unless nothing was started in this step, or
        # all slots are empty.
        while self._in_flight and (len(self._in_flight) > 1 or not started or not any(self._slots)):
            results = jax.device_get(self._in_flight[0].ticked)
            self._deliver_results(self._in_flight.popleft(), results)

        if not self._in_flight:
            self._last_fetch = 0.0  # the time until there is work again is not that of a tick

    # Prefill

    def _prefill_chunk_of_prompts(self) -> None:
        """Prefills prompts, or parts of them, for free slots, until about a chunk of tokens has been read."""
        # A budget of tokens instead of requests: it bounds how long a step keeps the running requests waiting.
        left = self._config.chunk
        while left > 0:
            before = self._stats.prompt_tokens
            if self._prefill is not None:
                self._continue_prefill(*self._prefill)
            elif not (self._prefill_pack() or self._start_prefill()):
                return
            left -= self._stats.prompt_tokens - before

    def _continue_prefill(self, handle: RequestHandle, task: PrefillTask) -> None:
        """Reads one more chunk of a prompt, and admits its request after the last one."""
        before = len(task.left)
        with self._ending_only(handle):
            self._decoder.read_chunk(task)
            self._stats.prompt_tokens += before - len(task.left)
            if task.done:
                self._admit(handle, task)
                self._prefill = None

    def _start_prefill(self) -> bool:
        """Takes the next prompt from the queue, to be read in chunks. Returns False if none can be started."""
        while handle := self._next_handle():
            # From here on the handle is in no queue, so `_ending_only` must end it if anything raises.
            self._queue.pop()
            with self._ending_only(handle):
                self._prefill = handle, self._decoder.start_prefill(handle.request)
                return True
        return False

    def _prefill_pack(self) -> bool:
        """Prefills the next prompts of the queue together, as many as fit a chunk. Returns False if none does."""
        left = self._config.chunk
        while (handle := self._next_handle()) and self._decoder.fits_pack(handle.request, left):
            self._queue.pop()
            with self._ending_only(handle):
                # The slot is taken at once, so that `_next_handle` counts it when it looks for another prompt.
                owner, slot = RunningRequest(handle, self._tokenizer), self._slots.index(None)
                self._pack[slot] = self._decoder.start_prefill(handle.request)
                self._slots[slot] = owner
                left -= len(handle.request.prompt_ids)
        if not self._pack:
            return False
        self._admit_pack()
        return True

    def _next_handle(self) -> RequestHandle | None:
        """Returns the next request of the queue, without removing it, if there is a slot and enough pages for it.

        While it waits for pages, so do those after it: small requests that overtake it could delay it forever.
        """
        while None in self._slots and len(self._queue):
            handle = self._queue.first()
            if not handle.cancelled:
                return handle if self._decoder.has_room(handle.request) else None
            # Cancelled while it waited, after `drop_cancelled`.
            self._queue.pop()
            self._end_unstarted(handle, Finish.CANCELLED)
        return None

    def _admit(self, handle: RequestHandle, task: PrefillTask) -> None:
        """Gives a slot to a request whose prompt has been read."""
        slot, owner = self._slots.index(None), RunningRequest(handle, self._tokenizer)
        first = self._decoder.admit(task, slot)
        self._slots[slot] = owner
        self._in_flight.append(_InFlight(first, tuple(self._slots), (slot,)))

    def _admit_pack(self) -> None:
        """Prefills the prompts of a pack in the slots that were taken for them. An error ends all of them."""
        tasks, self._pack = self._pack, {}
        try:
            first = self._decoder.admit_pack(tasks)
        except Exception as error:
            # The prompts ran in one program, so there is no telling which of them caused the error.
            for slot, task in tasks.items():
                owner, self._slots[slot] = self._slots[slot], None
                self._decoder.abandon(task)
                assert owner is not None
                owner.end(Finish.FAILED, error=f"its prompt: {described(error)}")
            if self._decoder.lost:
                self.start_over(error)
            return
        self._stats.prompt_tokens += sum(len(task.left) for task in tasks.values())
        self._in_flight.append(_InFlight(first, tuple(self._slots), tuple(tasks)))

    @contextlib.contextmanager
    def _ending_only(self, handle: RequestHandle) -> Iterator[None]:
        """Returns a context in which an error ends only this request, which is not in a slot yet."""
        try:
            yield
        except Exception as error:
            # Its pages are free for the next request.
            self._abandon_prefill()
            # Those messages are written for users; any other error is named with its type.
            what = str(error) if isinstance(error, PolicyError | UserError) else f"its prompt: {described(error)}"
            self._end_unstarted(handle, Finish.FAILED, what)
            if self._decoder.lost:
                self.start_over(error)

    def _abandon_prefill(self) -> None:
        if self._prefill is not None:
            self._decoder.abandon(self._prefill[1])
            self._prefill = None

    # Results

    def _deliver_results(self, program: _InFlight, results: Ticked) -> None:
        """Delivers the results of a program to the requests that were in the slots when it started."""
        # The first tokens of slots arrive without an axis of ticks.
        if program.firsts:
            for slot in program.firsts:
                self._deliver_first(program, slot, jax.tree.map(lambda x, slot=slot: x[slot], results))
            return

        # The time between two fetches is that of a tick, because the device works without a pause while there is work.
        now = time.monotonic()
        if self._last_fetch:
            self._stats.record_tick((now - self._last_fetch) / self._config.ticks)
        self._last_fetch = now

        for number in range(self._config.ticks):
            row = jax.tree.map(lambda x, number=number: x[number], results)
            self._stats.loops += int(row.active.sum())
            for slot, owner in enumerate(program.owners):
                self._deliver(owner, slot, jax.tree.map(lambda x, slot=slot: x[slot], row))

    def _deliver_first(self, program: _InFlight, slot: int, result: Ticked) -> None:
        """Delivers the first token of a slot.

        A prompt that failed in a pack is prefilled again alone, because another prompt may be the cause.
        """
        owner = program.owners[slot]
        if result.failed and len(program.firsts) > 1 and owner is not None and not owner.handle.done:
            first = self._decoder.admit_again(owner.handle.request, slot)
            self._in_flight.append(_InFlight(first, tuple(self._slots), (slot,)))
        else:
            self._deliver(owner, slot, result)

    def _deliver(self, owner: RunningRequest | None, slot: int, result: Ticked) -> None:
        """Delivers the result of one slot, unless its request has ended, and so left the slot."""
        # The program was dispatched before the host knew that the request had ended; what it computed since is
        # discarded.
        if owner is None or owner.handle.done or not result.active:
            return

        if result.previews is not None:
            owner.preview(int(result.previews))
        if result.failed:
            self._end(slot, owner, Finish.FAILED, "logits were not finite; the parameters are damaged, or overflow")
        elif result.exited:
            self._deliver_token(slot, owner, result)

    def _deliver_token(self, slot: int, owner: RunningRequest, result: Ticked) -> None:
        """Delivers a token, and ends its request or updates its budget."""
        self._stats.tokens += 1
        try:
            finish = owner.push(
                int(result.tokens), int(result.exit_loops), float(result.log_probs), float(result.exit_log_probs)
            )
        except RequestError as error:
            self._end(slot, owner, Finish.FAILED, str(error))
            return

        if finish is not None:
            self._end(slot, owner, finish)
            return

        # The measured time of a tick turns a budget of time into one of loops. A token needs at least one loop.
        limit = owner.handle.request.milliseconds_per_token
        if limit < float("inf") and self._stats.seconds_a_tick:
            self._decoder.set_budget(slot, max(limit / 1000 / self._stats.seconds_a_tick, 1.0))

    # Ends

    def _end(self, slot: int, owner: RunningRequest, finish: Finish, error: str = "") -> None:
        self._decoder.release(slot)
        self._slots[slot] = None
        owner.end(finish, lambda tokens: self._decoder.copy_row(slot, tokens), error)

    def _end_unstarted(self, handle: RequestHandle, finish: Finish, error: str = "") -> None:
        RunningRequest(handle, self._tokenizer).end(finish, error=error)

    def drop_cancelled(self) -> None:
        """Ends requests that were cancelled since the last call. The cost does not depend on how many others wait."""
        while self.cancelled:
            handle = self.cancelled.popleft()
            # A request may finish before its cancellation is processed.
            if handle.done:
                continue
            if self._queue.discard(handle.request.client, handle):
                self._end_unstarted(handle, Finish.CANCELLED)
            elif self._prefill is not None and self._prefill[0] is handle:
                self._abandon_prefill()
                self._end_unstarted(handle, Finish.CANCELLED)
            else:
                for slot, owner in enumerate(self._slots):
                    if owner is not None and owner.handle is handle:
                        self._end(slot, owner, Finish.CANCELLED)

    def cancel_all(self) -> None:
        """Ends all requests as cancelled."""
        while len(self._queue):
            self._end_unstarted(self._queue.pop(), Finish.CANCELLED)
        for owner in self._slots:
            if owner is not None:
                # Cancelling a handle queues it for `drop_cancelled`, which knows in which of the three places a request
                # may be.
                owner.handle.cancel()
        if self._prefill is not None:
            self._prefill[0].cancel()
        self.drop_cancelled()
        self._in_flight.clear()

    def start_over(self, error: BaseException) -> None:
        """Empties the slots after an error in the middle of a step. Their requests fail; those in the queue remain."""
        _log.info("the requests in the slots have failed", exc_info=error)
        self._fail_started(f"the engine had to start over ({described(error)})")
        try:
            self._decoder.start_over()
        except Exception as again:
            # Without memory for new slots there is nothing to serve requests with.
            self.stop(again)

    def stop(self, error: BaseException) -> None:
        """Fails all requests, and refuses new ones, so that no caller waits forever."""
        self.stopped = f"the engine has stopped ({described(error)}); make a new one"
        self._fail_started(self.stopped)
        while len(self._queue):
            self._end_unstarted(self._queue.pop(), Finish.FAILED, self.stopped)

    def _fail_started(self, error: str) -> None:
        """Fails the requests in the slots and the one that is being prefilled."""
        owners = [owner for owner in self._slots if owner is not None]
        if self._prefill is not None:
            owners.append(RunningRequest(self._prefill[0], self._tokenizer))
        self._slots, self._prefill, self._pack = [None] * self._config.slots, None, {}
        self._in_flight.clear()
        for owner in owners:
            if not owner.handle.done:
                owner.end(Finish.FAILED, error=error)
