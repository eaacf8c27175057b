"""The engine: requests join and leave at any tick, and every pass of the shared stack serves all of them.

    engine = Engine(model, params, tokenizer)
    results = engine.generate(["Once", "def main("], max_new_tokens=64, policy=QExit(q=0.5))
    for new in engine.stream("Once", max_new_tokens=64):
        print(new.text, end="")

A step reads about a chunk's worth of prompts and then runs one tick, so that a long prompt holds up nobody and short
ones do not wait for one another. What a tick gave is fetched while the next one runs.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference.checks import check_request
from looplm_jax.inference.decoder import Decoder, EngineConfig, PolicyError, Reading
from looplm_jax.inference.fair_queue import FairQueue
from looplm_jax.inference.requests import NewToken, Request, Result
from looplm_jax.inference.stopping import Finish
from looplm_jax.inference.tick import Ticked
from looplm_jax.inference.ticket import Ticket
from looplm_jax.inference.under_way import UnderWay
from looplm_jax.models.looplm import LoopLM, Params

Prompt = str | Sequence[int]


@dataclasses.dataclass
class EngineStats:
    """What was done so far."""

    ticks: int = 0  # passes of the stack
    loops: int = 0  # loops of tokens in them: ticks times slots at best
    tokens: int = 0  # new tokens given out
    prompt_tokens: int = 0
    seconds_a_tick: float = 0.0  # moving mean

    def timed(self, seconds: float) -> None:
        """One more tick's time."""
        self.seconds_a_tick = seconds if not self.seconds_a_tick else 0.9 * self.seconds_a_tick + 0.1 * seconds


@dataclasses.dataclass(frozen=True)
class _Tick:
    """A tick that is being computed, and who was in the slots when it began."""

    ticked: Ticked
    owners: tuple[UnderWay | None, ...]
    slot: int | None = None  # the one slot it speaks of: a first token


class Engine:
    """Continuous depth batching over a fixed number of slots.

    Somebody must step it: `generate` and `stream` do; `with engine.serving():` a thread does, and then `submit` is all.
    Methods may be called from any thread.
    """

    def __init__(
        self,
        model: LoopLM,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        config: EngineConfig | None = None,
        mesh: Mesh | None = None,
    ):
        self.config = config or EngineConfig()
        self.stats = EngineStats()
        self._tokenizer = tokenizer
        self._model_config = model.config
        self._decoder = Decoder(model, params, self.config, mesh)
        self._queue: FairQueue[Ticket] = FairQueue(self.config.queue)
        self._slots: list[UnderWay | None] = [None] * self.config.slots
        self._reading: tuple[Ticket, Reading] | None = None
        self._flying: collections.deque[_Tick] = collections.deque()
        self._stopped = ""  # why it serves nobody any more
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._last_fetch = 0.0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of all slots."""
        return self._decoder.cache_bytes

    @property
    def window(self) -> int:
        """Tokens that a request may have, prompt and text together."""
        return min(self.config.capacity, self._model_config.max_positions)

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Result]:
        """Answers to all prompts, in their order; any number of them, a queue's worth at a time.

        Args:
          prompts: texts, or lists of token ids.
          **options: fields of `Request`, the same for all.

        Raises:
          UserError: a prompt or an option that cannot be served; nothing was begun then.
        """
        waiting, tickets = collections.deque(self.requests(prompts, **options)), list[Ticket]()
        try:
            while waiting or not all(ticket.done for ticket in tickets):
                while waiting and not self._queue.full:
                    tickets.append(self.submit(waiting.popleft()))
                self.step()
        finally:
            for ticket in tickets:  # after an interrupt nobody waits for the rest
                ticket.cancel()
        return [ticket.result() for ticket in tickets]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[NewToken]:
        """The tokens of one answer as they come. Closing the iterator cancels the request."""
        ticket = self.submit(self._request(prompt, options))
        try:
            while not ticket.done:
                self.step()
                yield from ticket.ready()
            yield from ticket.ready()
            if ticket.result().finish is Finish.FAILED:
                raise UserError(ticket.result().error)
        finally:
            ticket.cancel()

    def requests(self, prompts: Sequence[Prompt], **options: Any) -> list[Request]:
        """Requests for `submit`; arguments and errors as in `generate`."""
        return [self._request(prompt, options) for prompt in prompts]

    def submit(self, request: Request) -> Ticket:
        """Put a request into the queue.

        Raises:
          UserError: it can never be served, or the queue is full.
        """
        check_request(request, self._model_config, self.config, self._tokenizer)
        ticket = Ticket(request)
        with self._work:
            if self._stopped:
                raise UserError(self._stopped)
            if self._queue.full:
                self._drop_cancelled()
            if self._queue.full:
                raise UserError(f"{self.config.queue} requests are waiting; try again when some are answered")
            self._queue.push(request.client, ticket)
            self._work.notify()
        return ticket

    def step(self) -> bool:
        """About a chunk of prompts and one tick, as far as there is work; False when there is none left."""
        with self._lock:
            self._drop_cancelled()
            self._read()
            if any(self._slots):
                self._flying.append(_Tick(self._decoder.tick(), tuple(self._slots)))
                self.stats.ticks += self.config.ticks
            while self._flying and (len(self._flying) > 1 or not any(self._slots)):
                found = jax.device_get(self._flying[0].ticked)  # an interrupt while it waits loses no tick
                self._give_out(self._flying.popleft(), found)
            if not self._flying:
                self._last_fetch = 0.0  # what passes until there is work again is not a tick's time
            return bool(self._flying or any(self._slots) or self._reading or len(self._queue))

    @contextlib.contextmanager
    def serving(self) -> Iterator["Engine"]:
        """Step in a thread of its own while the block runs; what is unfinished at its end is cancelled."""
        stopping = threading.Event()
        thread = threading.Thread(target=self._serve, args=(stopping,), name="looplm-engine", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stopping.set()
            with self._work:
                self._work.notify()
            thread.join()
            self._cancel_all()

    def _serve(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set():
                if not self.step():
                    with self._work:
                        if not len(self._queue) and not stopping.is_set():
                            self._work.wait()
        except Exception as error:  # such as a device out of memory: nobody must wait for ever
            self._fail_all(f"the engine has stopped ({type(error).__name__}: {error}); make a new one")

    def _request(self, prompt: Prompt, options: dict[str, Any]) -> Request:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise UserError("text needs a tokenizer: Engine(model, params, tokenizer); or give token ids")
            prompt = [self._tokenizer.bos_id, *self._tokenizer.encode(prompt)]
        request = Request(prompt_ids=tuple(prompt), **options)
        check_request(request, self._model_config, self.config, self._tokenizer)
        return request

    def _read(self) -> None:
        """Prompts, or parts of them, for free slots, until a chunk's worth of tokens was read."""
        left = self.config.chunk
        while left > 0 and (self._reading is not None or self._begin_reading()):
            assert self._reading is not None
            ticket, reading = self._reading
            before = len(reading.left)
            self._decoder.read_chunk(reading)
            count = before - len(reading.left)
            self.stats.prompt_tokens += count
            left -= count
            if reading.done:
                self._reading = None
                self._admit(ticket, reading)

    def _begin_reading(self) -> bool:
        """Take the next prompt from the queue; False if there is none, or no slot for it."""
        while None in self._slots and len(self._queue):
            ticket = self._queue.pop()
            if not ticket.cancelled:
                self._reading = ticket, self._decoder.read(ticket.request)
                return True
            UnderWay(ticket, self._tokenizer).end(Finish.CANCELLED)
        return False

    def _admit(self, ticket: Ticket, reading: Reading) -> None:
        """A prompt that was read gets a slot."""
        slot, owner = self._slots.index(None), UnderWay(ticket, self._tokenizer)
        try:
            first = self._decoder.admit(reading, slot)
        except PolicyError as error:
            owner.end(Finish.FAILED, error=str(error))
            return
        self._slots[slot] = owner
        self._flying.append(_Tick(first, tuple(self._slots), slot))

    def _give_out(self, tick: _Tick, found: Ticked) -> None:
        """What a tick gave, to those who were there when it began."""
        if tick.slot is not None:
            self._deliver(tick.owners[tick.slot], tick.slot, found)
            return
        now = time.monotonic()
        if self._last_fetch:
            self.stats.timed((now - self._last_fetch) / self.config.ticks)
        self._last_fetch = now
        for number in range(self.config.ticks):
            row = jax.tree.map(lambda x, number=number: x[number], found)
            self.stats.loops += int(row.active.sum())
            for slot, owner in enumerate(tick.owners):
                self._deliver(owner, slot, jax.tree.map(lambda x, slot=slot: x[slot], row))

    def _deliver(self, owner: UnderWay | None, slot: int, found: Ticked) -> None:
        """What a slot has to say to its owner; an owner that is done has left the slot."""
        if owner is None or owner.ticket.done or not found.active:
            return
        if found.previews is not None:
            owner.preview(int(found.previews))
        if found.failed:
            self._end(slot, owner, Finish.FAILED, "logits were not finite; the parameters are damaged, or overflow")
        elif found.exited:
            self._give(slot, owner, found)

    def _give(self, slot: int, owner: UnderWay, found: Ticked) -> None:
        self.stats.tokens += 1
        try:
            finish = owner.push(int(found.tokens), int(found.exit_loops), float(found.log_probs))
        except Exception as error:  # of the request's own callback: the others go on
            self._end(slot, owner, Finish.FAILED, f"on_token raised {type(error).__name__}: {error}")
            return
        if finish is not None:
            self._end(slot, owner, finish)
            return
        limit = owner.ticket.request.milliseconds_per_token
        if limit < float("inf") and self.stats.seconds_a_tick:
            self._decoder.set_budget(slot, max(limit / 1000 / self.stats.seconds_a_tick, 1.0))

    def _end(self, slot: int, owner: UnderWay, finish: Finish, error: str = "") -> None:
        self._decoder.release(slot)
        self._slots[slot] = None
        owner.end(finish, lambda tokens: self._decoder.keep(slot, tokens), error)

    def _drop_cancelled(self) -> None:
        for ticket in self._queue.remove(lambda ticket: ticket.cancelled):
            UnderWay(ticket, self._tokenizer).end(Finish.CANCELLED)
        for slot, owner in enumerate(self._slots):
            if owner is not None and owner.ticket.cancelled:
                self._end(slot, owner, Finish.CANCELLED)
        if self._reading is not None and self._reading[0].cancelled:
            UnderWay(self._reading[0], self._tokenizer).end(Finish.CANCELLED)
            self._reading = None

    def _fail_all(self, error: str) -> None:
        with self._lock:
            self._stopped = error
            owners = [owner for owner in self._slots if owner is not None]
            waiting = [self._queue.pop() for _ in range(len(self._queue))]
            waiting += [] if self._reading is None else [self._reading[0]]
            for owner in owners + [UnderWay(ticket, self._tokenizer) for ticket in waiting]:
                if not owner.ticket.done:
                    owner.end(Finish.FAILED, error=error)
            self._slots, self._reading = [None] * self.config.slots, None
            self._flying.clear()

    def _cancel_all(self) -> None:
        with self._lock:
            for owner in self._slots:
                if owner is not None:
                    owner.ticket.cancel()
            if self._reading is not None:
                self._reading[0].cancel()
            while len(self._queue):
                UnderWay(self._queue.pop(), self._tokenizer).end(Finish.CANCELLED)
            self._drop_cancelled()
            self._flying.clear()
