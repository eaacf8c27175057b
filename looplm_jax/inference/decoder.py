"""What the engine keeps on the devices: parameters, slots, and the programs that change them."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy, FixedLoops
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.inference.engine_config import EngineConfig
from looplm_jax.inference.kv_cache import Cache, bucket
from looplm_jax.inference.loopwise_prefill import Chunk, begin_chunk, no_last_token, run_loop, write_kept
from looplm_jax.inference.packed_prefill import Pack, admit_pack, make_pack, pack_size
from looplm_jax.inference.page_pool import PagePool
from looplm_jax.inference.placing import on_mesh, placed
from looplm_jax.inference.prefill import (
    LastToken,
    Place,
    admit,
    after_chunk,
    extract_row,
    fill_pages,
    prefill_chunk,
    row_of_pages,
)
from looplm_jax.inference.requests import Request
from looplm_jax.inference.sampling import SamplingTable
from looplm_jax.inference.slots import (
    MOST_STOP_IDS,
    NO_TOKEN,
    Settings,
    Slots,
    empty_slots,
    grow_policies,
    release,
    set_budget,
)
from looplm_jax.inference.tick import Ticked, run_ticks
from looplm_jax.models.blocks import unroll_layers
from looplm_jax.models.looplm import UNCAST, LoopLM, Params, compute_dtype
from looplm_jax.sharding import target_platform

_LONGEST_ROW = 1 << 24


class PolicyError(Exception):
    """The exit policy of a request cannot be used. The slots are as they were."""


@dataclasses.dataclass
class Reading:
    """A prompt on its way into a slot, which has the pages for all tokens of its request."""

    request: Request
    pages: tuple[int, ...]
    left: Sequence[int]
    last: LastToken | None = None
    chunks: list[Chunk] = dataclasses.field(default_factory=list)  # of a prompt that is read loop by loop
    runs: int = 0  # loops of these chunks that were run

    @property
    def done(self) -> bool:
        """Whether all of it was read."""
        return not self.left


def in_dtype_of_products(params: Params, dtype: DTypeLike) -> Params:
    """Returns parameters in the type that every tick casts them to, save the gate, which it does not cast."""
    return {
        name: value if name in UNCAST else jax.tree.map(lambda leaf: leaf.astype(dtype), value)
        for name, value in params.items()
    }


class Decoder:
    """Slots on devices. Methods return at once, with results still being computed.

    Ids from `usable` on are never chosen; None: all rows of the head are ids.
    """

    def __init__(
        self,
        model: LoopLM,
        params: Params,
        config: EngineConfig,
        mesh: Mesh | None = None,
        *,
        usable: int | None = None,
    ):
        # A scan over layers copies each layer's weights, on a CPU, before it multiplies by them.
        unrolled = jax.default_backend() == "cpu" if config.unroll is None else config.unroll
        self.model = LoopLM(model.config, model.compute, unrolled=unrolled)
        self.config = config
        self.loops = config.loops or model.config.loops
        self._usable = model.config.vocab_size if usable is None else usable
        self._mesh = mesh
        with on_mesh(mesh):
            products = compute_dtype(model.compute)
            held = params if target_platform() == "cpu" else in_dtype_of_products(params, products)
        self._params = unroll_layers(held) if unrolled else held
        self._dtype = jnp.dtype(config.cache_dtype or products)
        self.start_over()

    def start_over(self) -> None:
        """Empty slots: whatever was in them, or on its way there, is lost."""
        self._remembers = False
        self._pool = PagePool(self.config.pool.pages)
        self._held: dict[int, tuple[int, ...]] = {}  # pages of the request in each slot
        self._slots = self._empty_slots()

    @property
    def lost(self) -> bool:
        """Whether a program that failed, or was interrupted, took the slots with it: they were donated to it."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self._slots))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of all slots."""
        return self._slots.cache.nbytes

    def has_room(self, request: Request) -> bool:
        """Whether enough pages are free for all tokens of a request."""
        return self._pages_of(request) <= self._pool.free

    def read(self, request: Request) -> Reading:
        """Begin with a prompt that there is room for; call `read_chunk` until it is done, or `abandon` it.

        Raises:
          PolicyError: its policy is a function that raises, or a class that fits no table.
        """
        self._make_room(request)
        pages = self._pool.reserve(self._pages_of(request))
        return Reading(request=request, pages=pages, left=request.prompt_ids)

    def read_chunk(self, reading: Reading) -> None:
        """Read a chunk more of a prompt. Where the cache has one plane, as many loops of any of its chunks are run."""
        request, size = reading.request, min(len(reading.left), self.config.chunk)
        start = len(request.prompt_ids) - len(reading.left)
        with on_mesh(self._mesh):
            if request.past is not None and start == 0:
                self._set_planes(fill_pages(self._row(reading, -request.tokens_before), request.past.row))
            if self.config.cache.shares:
                self._run_loops(reading)
            else:
                tokens, count = self._chunk(request, start)
                row, last = prefill_chunk(self.model, self._params, self._row(reading, start), tokens, count)
                reading.last = last if reading.last is None else after_chunk(reading.last, last)
                self._set_planes(row)
        reading.left = reading.left[size:]

    def _run_loops(self, reading: Reading) -> None:
        """Run T loops of chunks in the order of `loopwise_prefill`: all chunks in one loop before any in the next."""
        request = reading.request
        starts = range(0, len(request.prompt_ids), self.config.chunk)
        if reading.last is None:
            reading.last = placed(lambda: no_last_token(self.model, self.loops), self._mesh)
        for _ in range(self.loops):
            loop, index = divmod(reading.runs, len(starts))
            row = self._row(reading, starts[index])
            if loop == 0:
                row, chunk = begin_chunk(self.model, self._params, row, *self._chunk(request, starts[index]))
                reading.chunks.append(chunk)
            row, reading.chunks[index], reading.last = run_loop(
                self.model, self._params, row, reading.chunks[index], reading.last, np.int32(loop)
            )
            self._set_planes(row)
            reading.runs += 1
        if reading.runs == self.loops * len(starts):
            for start, chunk in zip(starts, reading.chunks, strict=True):
                if chunk.kept is not None:
                    self._set_planes(write_kept(self._row(reading, start), chunk, reading.last))

    def abandon(self, reading: Reading) -> None:
        """Give up a prompt that is in no slot."""
        self._pool.release(reading.pages)
        reading.pages = ()

    def admit(self, reading: Reading, slot: int) -> Ticked:
        """Put a prompt that was read into a slot; its first token, as a tick gives tokens."""
        assert reading.last is not None
        request = reading.request
        place = Place(
            slot=np.int32(slot),
            pages=self._padded(reading.pages),
            length=np.int32(request.tokens_before + len(request.prompt_ids)),
        )
        with on_mesh(self._mesh):
            self._slots, first = admit(
                self.model,
                self._params,
                self._slots,
                reading.last,
                place,
                self._settings(request),
                self._seen(request),
            )
        self._held[slot], reading.pages = reading.pages, ()
        return first

    def fits_pack(self, request: Request, size: int) -> bool:
        """Whether the prompt of a request can be part of a pack that has room for `size` more tokens."""
        return request.past is None and len(request.prompt_ids) <= size

    def admit_pack(self, readings: Mapping[int, Reading]) -> Ticked:
        """Runs prompts that fit one chunk together, and puts each into its slot. Returns their first tokens."""
        with on_mesh(self._mesh):
            self._slots, first = admit_pack(
                self.model, self._params, self._slots, self._pack(readings), loops=self.loops
            )
        for slot, reading in readings.items():
            self._held[slot], reading.pages = reading.pages, ()
        return first

    def admit_again(self, request: Request, slot: int) -> Ticked:
        """Runs the prompt of a slot again, in a pack of its own. Returns its first token."""
        reading = Reading(request=request, pages=self._held[slot], left=request.prompt_ids)
        return self.admit_pack({slot: reading})

    def tick(self) -> Ticked:
        """`config.ticks` passes of the stack; what each gave, with a leading axis of ticks and one of slots."""
        config = self.config
        with on_mesh(self._mesh):
            self._slots, ticked = run_ticks(
                self.model, self._params, self._slots, loops=self.loops, ticks=config.ticks, previews=config.previews
            )
        return ticked

    def release(self, slot: int) -> None:
        """Stop the request of a slot, whose pages are free for whatever is computed after this."""
        self._slots = release(self._slots, np.int32(slot))
        self._pool.release(self._held.pop(slot))

    def set_budget(self, slot: int, loops_per_token: float) -> None:
        """Another budget for the request of a slot."""
        self._slots = set_budget(self._slots, np.int32(slot), np.float32(loops_per_token))

    def keep(self, slot: int, tokens: int) -> Cache:
        """A copy of the cache of a slot that holds `tokens` tokens."""
        capacity = bucket(tokens, self.config.capacity)
        row = extract_row(self._slots.cache, np.int32(slot), capacity=capacity)
        # A pass that began before the host knew of the end may have added tokens that nobody was given.
        return dataclasses.replace(row, lengths=jnp.full(1, tokens, jnp.int32))

    def _pages_of(self, request: Request) -> int:
        return self.config.pool.needed(request.most_tokens)

    def _padded(self, pages: tuple[int, ...]) -> Int[np.ndarray, "W"]:
        """The entries of the table for these pages."""
        size = self.config.pool
        row = np.full(size.pages_per_slot, size.pages, np.int32)
        row[: len(pages)] = pages
        return row

    def _chunk(self, request: Request, start: int) -> tuple[Int[np.ndarray, "S"], np.int32]:
        """Returns a chunk of a prompt, padded to its bucket, and the number of its tokens."""
        part = request.prompt_ids[start : start + self.config.chunk]
        tokens = np.full(bucket(len(part), self.config.chunk), part[-1], np.int32)
        tokens[: len(part)] = part
        return tokens, np.int32(len(part))

    def _row(self, reading: Reading, start: int) -> Cache:
        """Returns the pages of a request as a row that is filled up to token `start` of its prompt."""
        request, chunk = reading.request, self.config.chunk
        whole, rest = divmod(len(request.prompt_ids), chunk)
        wanted = request.tokens_before + whole * chunk + (bucket(rest, chunk) if rest else 0)
        pages = self._padded(reading.pages)[: self.config.pool.needed(bucket(wanted, _LONGEST_ROW))]
        return row_of_pages(self._slots.cache, pages, request.tokens_before + start)

    def _pack(self, readings: Mapping[int, Reading]) -> Pack:
        slots, tokens = self.config.slots, sum(len(reading.left) for reading in readings.values())
        rows = {slot: self._settings(reading.request) for slot, reading in readings.items()}
        some = next(iter(rows.values()))
        seen = np.zeros((slots, self.model.config.vocab_size), bool) if self._remembers else None
        if seen is not None:
            for slot, reading in readings.items():
                seen[slot] = self._seen(reading.request)
        return make_pack(
            {slot: reading.left for slot, reading in readings.items()},
            slots=slots,
            size=pack_size(tokens, self.config.chunk),
            pages=np.stack([self._padded(readings[slot].pages if slot in readings else ()) for slot in range(slots)]),
            settings=jax.tree.map(lambda *leaves: np.stack(leaves), *(rows.get(slot, some) for slot in range(slots))),
            seen=seen,
        )

    def _seen(self, request: Request) -> Bool[np.ndarray, "V"] | None:
        """The tokens that a request begins with, where slots remember them."""
        if not self._remembers:
            return None
        seen = np.zeros(self.model.config.vocab_size, bool)
        seen[[*request.prompt_ids, *(request.past.tokens if request.past else ())]] = True
        return seen

    def _set_planes(self, cache: Cache) -> None:
        """Keys and values of all pages, after a program that they were donated to."""
        self._slots = self._slots.replace(cache=dataclasses.replace(self._slots.cache, planes=cache.planes))

    def _settings(self, request: Request) -> Settings:
        stop_ids = np.full(MOST_STOP_IDS, NO_TOKEN, np.int32)
        stop_ids[: len(request.stop_ids)] = request.stop_ids
        return Settings(
            policy=self._slots.settings.policy.row(self._policy(request)),
            sampling=SamplingTable.of(request.sampling, self._usable),
            limit=jnp.int32(request.max_new_tokens),
            budget=jnp.float32(request.loops_per_token),
            stop_ids=jnp.asarray(stop_ids),
        )

    def _policy(self, request: Request) -> ExitPolicy:
        return request.policy or FixedLoops(loops=self.loops)

    def _make_room(self, request: Request) -> None:
        """Whatever this request is the first to need; the programs are then compiled once more."""
        if not self._slots.settings.policy.accepts(self._policy(request)):
            try:
                self._slots = grow_policies(self.model, self._slots, self._policy(request))
            except UserError as error:
                raise PolicyError(str(error)) from error
            except Exception as error:
                raise PolicyError(f"the exit policy raised {type(error).__name__}: {error}") from error
        if request.sampling.repetition_penalty != 1 and not self._remembers:
            self._remembers = True
            shape = (self.config.slots, self.model.config.vocab_size)
            self._slots = self._slots.replace(seen=jnp.zeros(shape, bool))

    def _empty_slots(self) -> Slots:
        config = self.config

        def make() -> Slots:
            return empty_slots(
                self.model,
                config.cache,
                config.pool,
                rows=config.slots,
                loops=self.loops,
                cache_dtype=self._dtype,
                policies=PolicyTable.empty(config.slots),
            )

        with on_mesh(self._mesh):
            return placed(make, self._mesh)
