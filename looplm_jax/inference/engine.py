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
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference.checks import check_request, usable_ids
from looplm_jax.inference.decoder import Decoder, PolicyError, Reading
from looplm_jax.inference.deferred_signals import deferred_signals
from looplm_jax.inference.engine_config import EngineConfig
from looplm_jax.inference.fair_queue import FairQueue
from looplm_jax.inference.prompts import Prompt, make_requests
from looplm_jax.inference.requests import NewToken, Request, Result
from looplm_jax.inference.stats import EngineStats
from looplm_jax.inference.stopping import Finish
from looplm_jax.inference.tick import Ticked
from looplm_jax.inference.ticket import Ticket
from looplm_jax.inference.under_way import RequestError, UnderWay, described
from looplm_jax.models.looplm import LoopLM, Params

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Tick:
    """A tick that is being computed, and who was in the slots when it began."""

    ticked: Ticked
    owners: tuple[UnderWay | None, ...]
    firsts: tuple[int, ...] = ()  # the slots it speaks of, if it is not a tick but gives first tokens


class Engine:
    """Continuous depth batching over a fixed number of slots.

    Somebody must step it: `generate` and `stream` do; `with engine.serving():` a thread does, and then `submit` is all.
    Methods may be called from any thread.

    What fails for one request ends that request. A failure that takes the cache with it ends the requests in the slots;
    those that wait are served. Signals wait for the end of a step, so an interrupt leaves an engine that works.
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
        self.config = (config or EngineConfig()).fitted(model.config.max_positions)
        self.stats = EngineStats()
        self._tokenizer = tokenizer
        self._model_config = model.config
        self._mesh = mesh
        self._decoder = Decoder(model, params, self.config, mesh, usable=usable_ids(model.config, tokenizer))
        self._queue: FairQueue[Ticket] = FairQueue(self.config.queue)
        self._slots: list[UnderWay | None] = [None] * self.config.slots
        self._reading: tuple[Ticket, Reading] | None = None
        self._packed: dict[int, Reading] = {}  # prompts that are to be read together, by slot
        self._flying: collections.deque[_Tick] = collections.deque()
        self._given_up: collections.deque[Ticket] = collections.deque()  # cancelled, and not yet seen to be
        self._stepping = False
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

    def generate(self, prompts: Prompt | Sequence[Prompt], *, samples: int = 1, **options: Any) -> list[Result]:
        """Answers to all prompts, in their order; any number of them, a queue's worth at a time.

        Every result has random keys of its own: prompt i draws with `Sampling.index` i, its sample j with `sample` j,
        counted from those in `options`. A result's own `sampling` therefore reproduces it in any other call.

        Args:
          prompts: texts, or lists of token ids; a text, or a list of ids, by itself is one prompt.
          samples: results for each prompt, side by side: sample j of prompt i is number `i * samples + j`.
          **options: fields of `Request`, the same for all.

        Raises:
          UserError: a prompt or an option that cannot be served; nothing was begun then.
        """
        raised: list[BaseException] = []
        requests = self.requests(prompts, samples=samples, **options)
        tickets = [Ticket(request, self._given_up.append, raised) for request in requests]
        waiting, unanswered = collections.deque(tickets), collections.deque(tickets)
        try:
            while unanswered:
                while waiting and self._enqueue(waiting[0]):
                    waiting.popleft()
                self.step()
                while unanswered and unanswered[0].done:
                    unanswered.popleft()
                if raised:  # asked last: a callback that raises does so before its request is done
                    raise raised[0]
        finally:
            for ticket in tickets:  # after an interrupt nobody waits for the rest
                ticket.cancel()
        return [ticket.result() for ticket in tickets]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[NewToken]:
        """The tokens of one answer as they come. Closing the iterator cancels the request."""
        (request,) = self.requests([prompt], samples=1, **options)
        ticket = self.submit(request, wait=True)
        try:
            while not ticket.done:
                self.step()
                yield from ticket.ready()
            yield from ticket.ready()
            if ticket.raised:
                raise ticket.raised[0]
            if ticket.result().finish is Finish.FAILED:
                raise UserError(ticket.result().error)
        finally:
            ticket.cancel()

    def requests(self, prompts: Prompt | Sequence[Prompt], *, samples: int = 1, **options: Any) -> list[Request]:
        """Requests for `submit`; arguments and errors as in `generate`."""
        requests = make_requests(prompts, self._tokenizer, samples=samples, **options)
        for request in requests:
            self._check(request)
        return requests

    def submit(self, request: Request, *, wait: bool = False) -> Ticket:
        """Put a request into the queue.

        Args:
          request: what is asked.
          wait: step the engine until the queue has room, instead of raising.

        Raises:
          UserError: it can never be served, or the queue is full.
        """
        self._check(request)
        ticket = Ticket(request, self._given_up.append)
        try:
            while not self._enqueue(ticket):
                if not wait:
                    raise UserError(f"{self.config.queue} requests are waiting; try again when some are answered")
                self.step()
        except BaseException:
            ticket.cancel()  # an interrupt may have come when it was in the queue already
            raise
        return ticket

    def step(self) -> bool:
        """About a chunk of prompts and one tick, as far as there is work; False when there is none left."""
        with deferred_signals, self._lock:
            if self._stepping:
                raise UserError("on_token cannot step the engine that calls it; submit a request instead")
            self._stepping = True
            try:
                self._advance()
            except BaseException as error:
                self._start_over(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._stepping = False
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
            with deferred_signals, self._lock:
                stopping.set()
                self._work.notify_all()
            thread.join()

    def _serve(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set():
                if not self.step():
                    with self._lock:
                        if not len(self._queue) and not stopping.is_set():
                            self._work.wait()
            self._cancel_all()
        except BaseException as error:  # nobody must wait for ever
            self._stop(error)

    def _check(self, request: Request) -> None:
        check_request(request, self._model_config, self.config, self._tokenizer, self._mesh)

    def _enqueue(self, ticket: Ticket) -> bool:
        """Put a ticket into the queue; False when there is no room. Raises UserError for an engine that has stopped."""
        with deferred_signals, self._lock:
            if self._stopped:
                raise UserError(self._stopped)
            if self._queue.full and not self._stepping:
                self._drop_cancelled()
            if ticket.cancelled:
                self._end_unbegun(ticket, Finish.CANCELLED)
            elif self._queue.full:
                return False
            else:
                self._queue.push(ticket.request.client, ticket)
                self._work.notify()
        return True

    def _advance(self) -> None:
        """One step."""
        self._drop_cancelled()
        before = len(self._flying)
        self._read()
        if any(owner is not None and owner.needs_ticks for owner in self._slots):
            self._flying.append(_Tick(self._decoder.tick(), tuple(self._slots)))
            self.stats.ticks += self.config.ticks
        # The result of the last program is fetched in the next step, while the programs of that step run.
        began = len(self._flying) > before
        while self._flying and (len(self._flying) > 1 or not began or not any(self._slots)):
            found = jax.device_get(self._flying[0].ticked)
            self._give_out(self._flying.popleft(), found)
        if not self._flying:
            self._last_fetch = 0.0  # what passes until there is work again is not a tick's time

    def _read(self) -> None:
        """Prompts, or parts of them, for free slots, until a chunk's worth of tokens was read."""
        left = self.config.chunk
        while left > 0:
            before = self.stats.prompt_tokens
            if self._reading is not None:
                self._read_chunk(*self._reading)
            elif not (self._begin_pack() or self._begin_reading()):
                return
            left -= self.stats.prompt_tokens - before

    def _read_chunk(self, ticket: Ticket, reading: Reading) -> None:
        before = len(reading.left)
        with self._ending_only(ticket):
            self._decoder.read_chunk(reading)
            self.stats.prompt_tokens += before - len(reading.left)
            if reading.done:
                self._admit(ticket, reading)
                self._reading = None

    def _begin_reading(self) -> bool:
        """Take the next prompt from the queue, to be read in chunks; False if there is none that can be begun."""
        while ticket := self._next_ticket():
            self._queue.pop()
            with self._ending_only(ticket):
                self._reading = ticket, self._decoder.read(ticket.request)
                return True
        return False

    def _begin_pack(self) -> bool:
        """Read the next prompts from the queue together, as many as fit a chunk; False if the next one does not."""
        left = self.config.chunk
        while (ticket := self._next_ticket()) and self._decoder.fits_pack(ticket.request, left):
            self._queue.pop()
            with self._ending_only(ticket):
                owner, slot = UnderWay(ticket, self._tokenizer), self._slots.index(None)
                self._packed[slot] = self._decoder.read(ticket.request)
                self._slots[slot] = owner
                left -= len(ticket.request.prompt_ids)
        if not self._packed:
            return False
        self._admit_pack()
        return True

    def _next_ticket(self) -> Ticket | None:
        """The request whose turn it is, if there is a slot for it and enough pages. It stays in the queue.

        While it waits for pages, so do those behind it: small requests that overtake it could keep it waiting for ever.
        """
        while None in self._slots and len(self._queue):
            ticket = self._queue.first()
            if not ticket.cancelled:
                return ticket if self._decoder.has_room(ticket.request) else None
            self._queue.pop()
            self._end_unbegun(ticket, Finish.CANCELLED)
        return None

    def _abandon_reading(self) -> None:
        if self._reading is not None:
            self._decoder.abandon(self._reading[1])
            self._reading = None

    def _admit(self, ticket: Ticket, reading: Reading) -> None:
        """A prompt that was read gets a slot."""
        slot, owner = self._slots.index(None), UnderWay(ticket, self._tokenizer)
        first = self._decoder.admit(reading, slot)
        self._slots[slot] = owner
        self._flying.append(_Tick(first, tuple(self._slots), (slot,)))

    def _admit_pack(self) -> None:
        """The prompts of a pack are read in the slots that were taken for them. If that fails, it ends all of them."""
        readings, self._packed = self._packed, {}
        try:
            first = self._decoder.admit_pack(readings)
        except Exception as error:
            for slot, reading in readings.items():
                owner, self._slots[slot] = self._slots[slot], None
                self._decoder.abandon(reading)
                assert owner is not None
                owner.end(Finish.FAILED, error=f"its prompt: {described(error)}")
            if self._decoder.lost:
                self._start_over(error)
            return
        self.stats.prompt_tokens += sum(len(reading.left) for reading in readings.values())
        self._flying.append(_Tick(first, tuple(self._slots), tuple(readings)))

    @contextlib.contextmanager
    def _ending_only(self, ticket: Ticket) -> Iterator[None]:
        """What fails in the block ends this request, which is not in a slot yet."""
        try:
            yield
        except Exception as error:
            self._abandon_reading()
            what = str(error) if isinstance(error, PolicyError | UserError) else f"its prompt: {described(error)}"
            self._end_unbegun(ticket, Finish.FAILED, what)
            if self._decoder.lost:
                self._start_over(error)

    def _give_out(self, tick: _Tick, found: Ticked) -> None:
        """What a tick gave, to those who were there when it began."""
        if tick.firsts:
            for slot in tick.firsts:
                self._deliver_first(tick, slot, jax.tree.map(lambda x, slot=slot: x[slot], found))
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

    def _deliver_first(self, tick: _Tick, slot: int, found: Ticked) -> None:
        """The first token of a slot. What failed beside other prompts, which may be why, is read once more."""
        owner = tick.owners[slot]
        if found.failed and len(tick.firsts) > 1 and owner is not None and not owner.ticket.done:
            first = self._decoder.admit_again(owner.ticket.request, slot)
            self._flying.append(_Tick(first, tuple(self._slots), (slot,)))
        else:
            self._deliver(owner, slot, found)

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
        except RequestError as error:
            self._end(slot, owner, Finish.FAILED, str(error))
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

    def _end_unbegun(self, ticket: Ticket, finish: Finish, error: str = "") -> None:
        UnderWay(ticket, self._tokenizer).end(finish, error=error)

    def _drop_cancelled(self) -> None:
        """End what was cancelled since the last time: the cost does not depend on how many others wait."""
        while self._given_up:
            ticket = self._given_up.popleft()
            if ticket.done:
                continue
            if self._queue.discard(ticket.request.client, ticket):
                self._end_unbegun(ticket, Finish.CANCELLED)
            elif self._reading is not None and self._reading[0] is ticket:
                self._abandon_reading()
                self._end_unbegun(ticket, Finish.CANCELLED)
            else:
                for slot, owner in enumerate(self._slots):
                    if owner is not None and owner.ticket is ticket:
                        self._end(slot, owner, Finish.CANCELLED)

    def _start_over(self, error: BaseException) -> None:
        """Empty slots after a failure in the middle of a step: what was in them fails, what waits is served."""
        _log.info("the requests in the slots have failed", exc_info=error)
        self._fail_begun(f"the engine had to start over ({described(error)})")
        try:
            self._decoder.start_over()
        except Exception as again:
            self._stop(again)

    def _stop(self, error: BaseException) -> None:
        """Nothing is served any more, and nobody waits."""
        with self._lock:
            self._stopped = f"the engine has stopped ({described(error)}); make a new one"
            self._fail_begun(self._stopped)
            while len(self._queue):
                self._end_unbegun(self._queue.pop(), Finish.FAILED, self._stopped)

    def _fail_begun(self, error: str) -> None:
        owners = [owner for owner in self._slots if owner is not None]
        if self._reading is not None:
            owners.append(UnderWay(self._reading[0], self._tokenizer))
        self._slots, self._reading, self._packed = [None] * self.config.slots, None, {}
        self._flying.clear()
        for owner in owners:
            if not owner.ticket.done:
                owner.end(Finish.FAILED, error=error)

    def _cancel_all(self) -> None:
        with self._lock:
            while len(self._queue):
                self._end_unbegun(self._queue.pop(), Finish.CANCELLED)
            for owner in self._slots:
                if owner is not None:
                    owner.ticket.cancel()
            if self._reading is not None:
                self._reading[0].cancel()
            self._drop_cancelled()
            self._flying.clear()
