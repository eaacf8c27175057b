"""What the engine keeps on the devices: parameters, slots, and the programs that change them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy, FixedLoops
from looplm_jax.halting.policy_table import PolicyTable
from looplm_jax.inference.field_checks import truth, whole_number
from looplm_jax.inference.kv_cache import Cache, CacheStrategy, bucket
from looplm_jax.inference.placing import on_mesh, placed
from looplm_jax.inference.prefill import LastToken, admit, empty_row, extract_row, prefill_chunk, widen_row
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The size of an engine. Nothing here changes what a request is answered, save `cache`.

    Raises UserError for a size that cannot be.
    """

    slots: int = 8  # requests under way at one time
    capacity: int = 2048  # tokens of a request, prompt and text together; no more than the model has positions
    loops: int | None = None  # the most loops of a token; None: those the model is meant for
    cache: CacheStrategy = CacheStrategy.FULL
    cache_dtype: DTypeLike | None = None  # None: the dtype of the matrix products
    chunk: int = 256  # tokens of prompts that are read between two ticks, about
    ticks: int = 1  # passes of the stack between two looks at what came of them
    queue: int = 1024  # requests that may wait
    previews: bool = False  # whether every loop's likeliest token is wanted
    unroll: bool | None = None  # a copy of the weights, an array for each layer; None: on a CPU, where it is faster

    def __post_init__(self) -> None:
        for name in ("slots", "capacity", "chunk", "ticks", "queue"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        if self.loops is not None:
            object.__setattr__(self, "loops", whole_number("loops", self.loops, least=1))
        truth("previews", self.previews)
        if self.unroll is not None:
            truth("unroll", self.unroll)
        if not isinstance(self.cache, CacheStrategy):
            raise UserError(f"cache must be a CacheStrategy, such as CacheStrategy.LAST, not {self.cache!r}")
        if self.cache_dtype is not None:
            _check_dtype(self.cache_dtype)

    def fitted(self, positions: int) -> "EngineConfig":
        """The same, without room for tokens beyond the positions of a model, which no request can have."""
        return dataclasses.replace(self, capacity=min(self.capacity, positions))


def _check_dtype(dtype: DTypeLike) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise UserError(f"cache_dtype must be a floating-point type, such as jnp.bfloat16, not {dtype!r}")


class PolicyError(Exception):
    """The exit policy of a request cannot be used. The slots are as they were."""


@dataclasses.dataclass
class Reading:
    """A prompt on its way into a slot."""

    request: Request
    row: Cache
    left: Sequence[int]
    last: LastToken | None = None

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
        """Empty slots: whatever was in them is lost."""
        self._remembers = False
        self._slots = self._empty_slots()

    @property
    def lost(self) -> bool:
        """Whether a program that failed, or was interrupted, took the slots with it: they were donated to it."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self._slots))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of all slots."""
        return self._slots.cache.nbytes

    def read(self, request: Request) -> Reading:
        """Begin with a prompt; call `read_chunk` until it is done."""
        before = 0 if request.past is None else len(request.past)
        chunk = self.config.chunk
        whole, rest = divmod(len(request.prompt_ids), chunk)
        capacity = bucket(before + whole * chunk + (bucket(rest, chunk) if rest else 0), _LONGEST_ROW)
        with on_mesh(self._mesh):
            if request.past is None:
                row = self._empty_row(capacity)
            else:
                row = widen_row(request.past.row, capacity=max(capacity, request.past.row.capacity))
        return Reading(request=request, row=row, left=request.prompt_ids)

    def read_chunk(self, reading: Reading) -> None:
        """One more chunk of a prompt."""
        size = min(len(reading.left), self.config.chunk)
        tokens = np.full(bucket(size, self.config.chunk), reading.left[size - 1], np.int32)
        tokens[:size] = reading.left[:size]
        with on_mesh(self._mesh):
            reading.row, reading.last = prefill_chunk(self.model, self._params, reading.row, tokens, np.int32(size))
        reading.left = reading.left[size:]

    def admit(self, reading: Reading, slot: int) -> Ticked:
        """Put a prompt that was read into a slot; its first token, as a tick would give it, without axes.

        Raises:
          PolicyError: its policy is a function that raises, or a class that fits no table.
        """
        assert reading.last is not None
        request = reading.request
        self._make_room(request)
        seen = None
        if self._remembers:
            seen = np.zeros(self.model.config.vocab_size, bool)
            seen[[*request.prompt_ids, *(request.past.tokens if request.past else ())]] = True
        settings = self._settings(request)
        with on_mesh(self._mesh):
            self._slots, first = admit(
                self.model, self._params, self._slots, reading.row, reading.last, np.int32(slot), settings, seen
            )
        return first

    def tick(self) -> Ticked:
        """`config.ticks` passes of the stack; what each gave, with a leading axis of ticks and one of slots."""
        config = self.config
        with on_mesh(self._mesh):
            self._slots, ticked = run_ticks(
                self.model, self._params, self._slots, loops=self.loops, ticks=config.ticks, previews=config.previews
            )
        return ticked

    def release(self, slot: int) -> None:
        """Stop the request of a slot."""
        self._slots = release(self._slots, np.int32(slot))

    def set_budget(self, slot: int, loops_per_token: float) -> None:
        """Another budget for the request of a slot."""
        self._slots = set_budget(self._slots, np.int32(slot), np.float32(loops_per_token))

    def keep(self, slot: int, tokens: int) -> Cache:
        """A copy of the cache of a slot that holds `tokens` tokens."""
        capacity = bucket(tokens, self.config.capacity)
        row = extract_row(self._slots.cache, np.int32(slot), loops=self.loops, capacity=capacity)
        # A pass that began before the host knew of the end may have added tokens that nobody was given.
        return dataclasses.replace(row, lengths=jnp.full(1, tokens, jnp.int32))

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
                rows=config.slots,
                capacity=config.capacity,
                loops=self.loops,
                cache_dtype=self._dtype,
                policies=PolicyTable.empty(config.slots),
            )

        return placed(make, self._mesh)

    def _empty_row(self, capacity: int) -> Cache:
        return placed(lambda: empty_row(self.model, capacity=capacity, loops=self.loops, dtype=self._dtype), self._mesh)
