"""The state of an engine on the devices: parameters and slots, and the programs that change them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, PyTree

from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy, FixedLoops
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.inference._cache_layout import PagePool, init_sharded, use_mesh_or_none
from looplm_jax.inference._engine_config import EngineConfig
from looplm_jax.inference._kv_cache import Cache, bucket
from looplm_jax.inference._loopwise_prefill import Chunk, begin_chunk, no_last_token, run_loop, write_kept
from looplm_jax.inference._packed_prefill import Pack, admit_pack, make_pack, pack_size
from looplm_jax.inference._prefill import (
    LastToken,
    Place,
    admit,
    after_chunk,
    extract_row,
    fill_pages,
    prefill_chunk,
)
from looplm_jax.inference._requests import Request
from looplm_jax.inference._sampling import SamplingTable
from looplm_jax.inference._saved_programs import SavedPrograms
from looplm_jax.inference._slots import (
    MOST_STOP_IDS,
    NO_TOKEN,
    Slots,
    SlotSettings,
    empty_slots,
    grow_policies,
    release,
    set_budget,
)
from looplm_jax.inference._tick import Ticked, run_ticks
from looplm_jax.models._blocks import unroll_layers
from looplm_jax.models._looplm import UNCAST, LoopLM, Params, check_loops, compute_dtype, for_calls
from looplm_jax.sharding import target_platform

# An upper bound for `bucket` where the pages of a slot, not a length, limit a row.
_LONGEST_ROW = 1 << 24


class PolicyError(Exception):
    """The exit policy of a request cannot be used. The slots are as they were."""


@dataclasses.dataclass
class PrefillTask:
    """A prompt that is being prefilled. It has reserved the pages for all tokens of its request."""

    request: Request
    pages: tuple[int, ...]
    left: Sequence[int]
    last: LastToken | None = None
    chunks: list[Chunk] = dataclasses.field(default_factory=list)  # of a prompt that is prefilled loop by loop
    runs: int = 0  # loops of these chunks that have run

    @property
    def done(self) -> bool:
        """Whether the whole prompt has been read."""
        return not self.left


def in_dtype_of_products(params: Params, dtype: DTypeLike) -> Params:
    """Returns parameters in the dtype that every tick casts them to, except the gate, which is not cast."""
    return {
        name: value if name in UNCAST else jax.tree.map(lambda leaf: leaf.astype(dtype), value)
        for name, value in params.items()
    }


class Decoder:
    """The slots on the devices. Methods dispatch programs and return before these have finished.

    Ids from `usable` on are never chosen; None allows all rows of the head.
    """

    def __init__(
        self,
        model: LoopLM,
        params: Params,
        config: EngineConfig,
        mesh: Mesh | None = None,
        *,
        usable: int | None = None,
        programs: SavedPrograms | None = None,
    ):
        # On a CPU, a scan over layers copies the weights of each layer before it multiplies by them.
        unrolled = jax.default_backend() == "cpu" if config.unroll is None else config.unroll
        self.config = config
        self.loops = config.loops or model.config.loops
        check_loops(model.config, self.loops)
        self.model = for_calls(LoopLM(model.config, model.compute, unrolled=unrolled), self.loops)
        self._usable = model.config.vocab_size if usable is None else usable
        self._mesh = mesh
        self._programs = programs
        with use_mesh_or_none(mesh):
            self._dtype = jnp.dtype(config.cache_dtype or compute_dtype(model.compute))
        self.use(params)
        self.start_over()

    def use(self, params: Params) -> None:
        """Uses these parameters from the next program on. Programs compile again only for other shapes."""
        with use_mesh_or_none(self._mesh):
            # Elsewhere the cast happens once, here, instead of in every tick, which would read the float32 weights each
            # time.
            products = compute_dtype(self.model.compute)
            held = params if target_platform() == "cpu" else in_dtype_of_products(params, products)
        self._params = unroll_layers(held) if self.model.unrolled else held

    def start_over(self) -> None:
        """Empties all slots. Their requests, and prompts that are being prefilled, are lost."""
        # A repetition penalty needs an array [slots, V], which is allocated with the first request that has one.
        self._tracks_seen = False
        self._pool = PagePool(self.config.pool.pages)
        self._pages: dict[int, tuple[int, ...]] = {}  # pages of the request in each slot
        self._slots = self._make_slots()

    @property
    def lost(self) -> bool:
        """Whether the slots were lost, because a program to which they were donated failed or was interrupted."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self._slots))

    @property
    def cache_bytes(self) -> int:
        """The bytes of the cache of all slots."""
        return self._slots.cache.nbytes

    def has_room(self, request: Request) -> bool:
        """Whether enough pages are free for all tokens of a request."""
        return self._num_pages(request) <= self._pool.free

    def start_prefill(self, request: Request) -> PrefillTask:
        """Reserves the pages of a request that `has_room`. Call `read_chunk` until the task is done, or `abandon` it.

        Raises:
          PolicyError: its policy is a function that raises, or a class that fits no table.
        """
        # Before pages are reserved, so that a policy that raises leaves nothing to undo.
        self._add_needs(request)
        pages = self._pool.reserve(self._num_pages(request))
        return PrefillTask(request=request, pages=pages, left=request.prompt_ids)

    def read_chunk(self, task: PrefillTask) -> None:
        """Reads one more chunk of a prompt. With shared planes, it runs as many loops of any of its chunks."""
        request, size = task.request, min(len(task.left), self.config.chunk)
        start = len(request.prompt_ids) - len(task.left)

        with use_mesh_or_none(self._mesh):
            # The tokens of a prefix cache are copied into the pages once, before the first chunk attends to them.
            if request.past is not None and start == 0:
                self._set_planes(fill_pages(self._row(task, -request.tokens_before), request.past.row))
            if self.config.cache.shares:
                self._run_loops(task)
            else:
                tokens, count = self._chunk(request, start)
                row, last = prefill_chunk(self.model, self._params, self._row(task, start), tokens, count)
                task.last = last if task.last is None else after_chunk(task.last, last)
                self._set_planes(row)

        # Either way a chunk of tokens has been paid for: T loops of some chunk cost as much as one chunk in all loops.
        task.left = task.left[size:]

    def _run_loops(self, task: PrefillTask) -> None:
        """Runs T loops of chunks, all chunks in one loop before any in the next (see `_loopwise_prefill`)."""
        request = task.request
        starts = range(0, len(request.prompt_ids), self.config.chunk)

        if task.last is None:
            task.last = no_last_token(self.model, self.loops)

        # Runs are numbered loop by loop: run r is loop r // chunks of chunk r % chunks.
        for _ in range(self.loops):
            loop, index = divmod(task.runs, len(starts))
            row = self._row(task, starts[index])
            if loop == 0:
                row, chunk = begin_chunk(self.model, self._params, row, *self._chunk(request, starts[index]))
                task.chunks.append(chunk)
            row, task.chunks[index], task.last = run_loop(
                self.model, self._params, row, task.chunks[index], task.last, self._on_devices(np.int32(loop))
            )
            self._set_planes(row)
            task.runs += 1

        if task.runs == self.loops * len(starts):
            for start, chunk in zip(starts, task.chunks, strict=True):
                # A ring keeps nothing aside: its planes already have the last loops.
                if chunk.kept is not None:
                    self._set_planes(write_kept(self._row(task, start), chunk, task.last))

    def abandon(self, task: PrefillTask) -> None:
        """Releases the pages of a prompt that is in no slot."""
        self._pool.release(task.pages)
        # Emptied, so that abandoning a task twice releases its pages only once.
        task.pages = ()

    def admit(self, task: PrefillTask, slot: int) -> Ticked:
        """Puts a prompt that has been read into a slot. Returns its first token, in the form of a tick."""
        assert task.last is not None
        request = task.request
        length = np.int32(request.tokens_before + len(request.prompt_ids))
        # One transfer of all numbers, instead of one for each.
        slot_number, pages, length, settings, seen = self._on_devices(
            (np.int32(slot), self._padded(task.pages), length, self._settings(request), self._seen(request))
        )
        place = Place(slot=slot_number, pages=pages, length=length)

        with use_mesh_or_none(self._mesh):
            self._slots, first = admit(self.model, self._params, self._slots, task.last, place, settings, seen)

        # The slot owns the pages now.
        self._pages[slot], task.pages = task.pages, ()
        return first

    def fits_pack(self, request: Request, size: int) -> bool:
        """Whether the prompt of a request can be part of a pack that has room for `size` more tokens."""
        return request.past is None and len(request.prompt_ids) <= size

    def admit_pack(self, tasks: Mapping[int, PrefillTask]) -> Ticked:
        """Runs prompts that fit one chunk together, and puts each into its slot. Returns their first tokens."""
        pack = self._on_devices(self._pack(tasks))
        with use_mesh_or_none(self._mesh):
            self._slots, first = self._run(admit_pack, pack, result=_results(previews=False), loops=self.loops)
        for slot, task in tasks.items():
            self._pages[slot], task.pages = task.pages, ()
        return first

    def admit_again(self, request: Request, slot: int) -> Ticked:
        """Runs the prompt of a slot again, in a pack of its own. Returns its first token."""
        # The slot still owns its pages; `admit_pack` assigns the same ones again.
        task = PrefillTask(request=request, pages=self._pages[slot], left=request.prompt_ids)
        return self.admit_pack({slot: task})

    def tick(self) -> Ticked:
        """Runs `config.ticks` passes of the stack. Returns their results, with leading axes of ticks and slots."""
        config = self.config
        with use_mesh_or_none(self._mesh):
            self._slots, ticked = self._run(
                run_ticks,
                result=_results(previews=config.previews),
                loops=self.loops,
                ticks=config.ticks,
                previews=config.previews,
            )
        return ticked

    def _run(
        self, program: Callable[..., tuple[Slots, Ticked]], *arguments: PyTree, result: Ticked, **static: Any
    ) -> tuple[Slots, Ticked]:
        """Returns the slots, which are donated, and the results of a program. `result` has their structure."""
        inputs = (self.model, self._params, self._slots, *arguments)
        if self._programs is None:
            return program(*inputs, **static)
        return self._programs.run(program, *inputs, result=result, **static)

    def release(self, slot: int) -> None:
        """Ends the request of a slot. Its pages are free for programs that are dispatched after this."""
        # Programs run in the order of their dispatch, so a program that still writes these pages runs before their next
        # owner.
        self._slots = release(self._slots, self._on_devices(np.int32(slot)))
        self._pool.release(self._pages.pop(slot))

    def set_budget(self, slot: int, loops_per_token: float) -> None:
        """Changes the budget of the request in a slot."""
        numbers = self._on_devices((np.int32(slot), np.float32(loops_per_token)))
        self._slots = set_budget(self._slots, *numbers)

    def copy_row(self, slot: int, tokens: int) -> Cache:
        """Returns a copy of the first `tokens` tokens of a slot, as a cache of one row."""
        capacity = bucket(tokens, self.config.capacity)
        slot_number, lengths = self._on_devices((np.int32(slot), np.full(1, tokens, np.int32)))
        row = extract_row(self._slots.cache, slot_number, capacity=capacity)
        # A pass that was dispatched before the host saw the end may have added tokens that were never delivered.
        return dataclasses.replace(row, lengths=lengths)

    def _on_devices(self, numbers: Any) -> Any:
        """Returns NumPy numbers on all devices of the slots, by an explicit transfer, which a transfer guard allows."""
        return jax.device_put(numbers, None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec()))

    def _num_pages(self, request: Request) -> int:
        return self.config.pool.needed(request.max_tokens)

    def _padded(self, pages: tuple[int, ...]) -> Int[np.ndarray, "W"]:
        """Returns the entries of the page table for these pages."""
        size = self.config.pool
        # Entries without a page have the number of pages, which is no index of a page.
        row = np.full(size.pages_per_slot, size.pages, np.int32)
        row[: len(pages)] = pages
        return row

    def _chunk(self, request: Request, start: int) -> tuple[Int[Array, "S"], Int[Array, ""]]:
        """Returns a chunk of a prompt, padded to its bucket, and the number of its tokens."""
        chunk = request.prompt_ids[start : start + self.config.chunk]
        # Padding repeats the last token: its value has no effect, but must be in the vocabulary.
        tokens = np.full(bucket(len(chunk), self.config.chunk), chunk[-1], np.int32)
        tokens[: len(chunk)] = chunk
        tokens_and_count: tuple[Array, Array] = self._on_devices((tokens, np.int32(len(chunk))))
        return tokens_and_count

    def _row(self, task: PrefillTask, start: int) -> Cache:
        """Returns the pages of a request as a row that is filled up to token `start` of its prompt."""
        request, chunk = task.request, self.config.chunk
        whole, rest = divmod(len(request.prompt_ids), chunk)
        # The pages that the last, padded chunk touches, rounded up to a bucket, so that rows have few different shapes.
        wanted = request.tokens_before + whole * chunk + (bucket(rest, chunk) if rest else 0)
        pages = self._padded(task.pages)[: self.config.pool.needed(bucket(wanted, _LONGEST_ROW))]
        lengths = np.full(1, request.tokens_before + start, np.int32)
        table, lengths = self._on_devices((pages[None], lengths))
        return dataclasses.replace(self._slots.cache, lengths=lengths, table=table)

    def _pack(self, tasks: Mapping[int, PrefillTask]) -> Pack:
        """Returns the prompts of tasks, by slot, as one pack."""
        slots, tokens = self.config.slots, sum(len(task.left) for task in tasks.values())
        rows = {slot: self._settings(task.request) for slot, task in tasks.items()}
        # Slots outside the pack need settings of the right shape, too.
        some = next(iter(rows.values()))
        seen = np.zeros((slots, self.model.config.vocab_size), bool) if self._tracks_seen else None
        if seen is not None:
            for slot, task in tasks.items():
                seen[slot] = self._seen(task.request)

        return make_pack(
            {slot: task.left for slot, task in tasks.items()},
            slots=slots,
            size=pack_size(tokens, self.config.chunk),
            pages=np.stack([self._padded(tasks[slot].pages if slot in tasks else ()) for slot in range(slots)]),
            settings=jax.tree.map(lambda *leaves: np.stack(leaves), *(rows.get(slot, some) for slot in range(slots))),
            seen_tokens=seen,
        )

    def _seen(self, request: Request) -> Bool[np.ndarray, "V"] | None:
        """Returns a mask of the tokens that a request starts with, or None if no slot has a repetition penalty."""
        if not self._tracks_seen:
            return None
        mask = np.zeros(self.model.config.vocab_size, bool)
        mask[[*request.prompt_ids, *(request.past.tokens if request.past else ())]] = True
        return mask

    def _set_planes(self, cache: Cache) -> None:
        """Stores the keys and values of all pages after a program to which they were donated."""
        self._slots = self._slots.replace(cache=dataclasses.replace(self._slots.cache, planes=cache.planes))

    def _settings(self, request: Request) -> SlotSettings:
        """Returns the settings of a request as NumPy numbers."""
        # A static number of ids, filled with one that no token has, so that requests with any number share a program.
        stop_ids = np.full(MOST_STOP_IDS, NO_TOKEN, np.int32)
        stop_ids[: len(request.stop_ids)] = request.stop_ids
        host: dict[str, Any] = {
            "limit": np.int32(request.max_new_tokens),
            "budget": np.float32(request.loops_per_token),
            "stop_ids": stop_ids,
        }
        return SlotSettings(
            policy=self._slots.settings.policy.row(self._policy(request)),
            sampling=SamplingTable.of(request.sampling, self._usable),
            **host,
        )

    def _policy(self, request: Request) -> ExitPolicy:
        return request.policy or FixedLoops(loops=self.loops)

    def _add_needs(self, request: Request) -> None:
        """Adds what this request is the first to need. The programs are then compiled again."""
        if not self._slots.settings.policy.accepts(self._policy(request)):
            try:
                self._slots = grow_policies(self.model, self._slots, self._policy(request))
            except UserError as error:
                # A `Custom` policy runs the user's function here, so anything may be raised.
                raise PolicyError(str(error)) from error
            except Exception as error:
                raise PolicyError(f"the exit policy raised {type(error).__name__}: {error}") from error
        if request.sampling.repetition_penalty != 1 and not self._tracks_seen:
            self._tracks_seen = True
            # Slots that are running have no penalty, so it does not matter which tokens they have seen.
            shape = (self.config.slots, self.model.config.vocab_size)
            self._slots = self._slots.replace(seen_tokens=self._on_devices(np.zeros(shape, bool)))

    def _make_slots(self) -> Slots:
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

        with use_mesh_or_none(self._mesh):
            return init_sharded(make, self._mesh)


def _results(*, previews: bool) -> Ticked:
    """Returns the structure of the results of a program, with fields of no meaning."""
    fields = {field.name: 0 for field in dataclasses.fields(Ticked)}
    return Ticked(**{**fields, "previews": 0 if previews else None})  # type: ignore[arg-type]
