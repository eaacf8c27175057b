"""Plans one tick of the engine: compiles it for chips that need not be attached, and compares its bytes with a floor.

The floor is the bytes that every implementation must move: each parameter once, in the dtype of the matrix products,
the filled positions of one plane of the cache once, and the new position of every slot.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from looplm_jax.config import ComputeConfig, MeshConfig, ModelConfig
from looplm_jax.errors import UserError
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.inference import CacheStrategy, EngineConfig
from looplm_jax.inference._cache_layout import PoolSize, shardings
from looplm_jax.inference._kv_cache import bytes_per_token
from looplm_jax.inference._loopwise_prefill import bytes_per_prompt_token
from looplm_jax.inference._slots import Slots, empty_slots
from looplm_jax.inference._tick import run_ticks
from looplm_jax.models._looplm import LoopLM, Params, boxed_shapes, compute_dtype
from looplm_jax.planning._budget import DecodeTiming, ProgramBytes, decode_timing, shard_bytes
from looplm_jax.planning._compiler import OutOfMemory, compile_program
from looplm_jax.planning._hlo import parse
from looplm_jax.planning._program_facts import collectives
from looplm_jax.planning._targets import Target
from looplm_jax.planning._traffic import Buffer, CacheUse, Traffic, program_traffic
from looplm_jax.sharding import abstract_arrays, make_mesh, use_mesh

_PARAMETER = re.compile(r"^params\W+(\w+)")
_CACHE = "slots.cache.planes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """The size of the engine to plan. A tick reads `filled` positions of each slot.

    Raises UserError for a size out of range.
    """

    slots: int = 8
    capacity: int = 2048  # positions of the longest request
    page_size: int = 128  # positions
    pages: int | None = None  # None: enough for requests of `capacity` tokens in all slots
    cache: CacheStrategy = CacheStrategy.FULL
    filled: int | None = None  # None: half of the capacity, or of a slot's share of the pages if that is less
    loops_mean: float | None = None  # mean loops of a token with early exit

    def __post_init__(self) -> None:
        for name in ("slots", "capacity", "page_size", "pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        self._check_pool()

    def _check_pool(self) -> None:
        """Raises UserError if the pages do not suffice."""
        pool, filled = self.pool, self.filled

        # A request that fits no empty pool would wait in the queue forever.
        missing = pool.pages_per_slot - pool.pages
        if missing > 0:
            raise UserError(
                f"one request of --capacity={self.capacity} takes {pool.pages_per_slot} pages of {pool.page_size} "
                f"positions, and there are {pool.pages}: {missing} are missing; use --pages {pool.pages_per_slot}"
            )
        if filled is None:
            return

        if not 0 <= filled <= self.capacity:
            raise UserError(f"--filled must be between 0 and --capacity={self.capacity}, not {filled}")

        # All slots are filled at once in the tick that is planned.
        missing = self.slots * pool.needed(filled) - pool.pages
        if missing > 0:
            raise UserError(
                f"--filled={filled} takes {pool.pages + missing} pages of {pool.page_size} positions in {self.slots} "
                f"slots, and there are {pool.pages}: {missing} are missing; use --pages {pool.pages + missing}"
            )

    @property
    def pool(self) -> PoolSize:
        """The pages that the slots share."""
        return PoolSize.of(slots=self.slots, capacity=self.capacity, page_size=self.page_size, pages=self.pages)

    @property
    def positions(self) -> int:
        """The positions of each slot that a tick reads."""
        if self.filled is not None:
            return self.filled
        return min(self.capacity, self.pool.positions // self.slots) // 2

    def check(self, model: ModelConfig) -> None:
        """Raises UserError if the model does not support this capacity or this mean number of loops."""
        if self.capacity > model.max_positions:
            raise UserError(
                f"--capacity={self.capacity} is beyond model.max_positions={model.max_positions}; no request is longer"
            )
        if self.loops_mean is not None and not 1 <= self.loops_mean <= model.loops:
            raise UserError(
                f"--loops-mean must be between 1 and the {model.loops} loops of the model, not {self.loops_mean:g}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeMemory:
    """The memory of one device in bytes, as the compiler reports it.

    Attributes:
      parameters: the parameters.
      cache: the keys and values of all slots.
      temporaries: temporaries of the program at their peak.
      other: the code of the program, and padding of arrays to tiles.
      capacity: the memory of the device, or None if it is not known.
    """

    parameters: int
    cache: int
    temporaries: int
    other: int
    capacity: int | None

    @property
    def total(self) -> int:
        """The peak memory of the device."""
        return self.parameters + self.cache + self.temporaries + self.other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """The bytes that one device must move in a tick. An untied embedding counts with one row for each slot."""

    parameters: int
    cache_read: int
    cache_written: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.cache_read + self.cache_written


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """The plan of a tick.

    Attributes:
      target: the name of the target.
      devices: the number of devices.
      dtype: the dtype of matrix products and of the cache.
      loops: the number of loops.
      request: the size of the engine.
      fits: whether the tick fits in the memory of a device.
      memory: the memory of a device.
      moved: the bytes that a tick reads and writes, or None if it does not fit.
      floor: the bytes that it must move at least.
      sent: the bytes that each device sends to other devices in a tick.
      reading: the bytes of a device that the prefill of a prompt of `capacity` tokens needs in addition to its pages.
      timing: a lower bound of the time, or None if the tick does not fit or the chip is unknown.
      compile_seconds: how long the compilation took.
    """

    target: str
    devices: int
    dtype: str
    loops: int
    request: DecodeRequest
    fits: bool
    memory: DecodeMemory
    moved: Traffic | None
    floor: Floor
    sent: int
    reading: int
    timing: DecodeTiming | None
    compile_seconds: float

    @property
    def ratio(self) -> float | None:
        """The bytes moved divided by the bytes of the floor."""
        return None if self.moved is None else self.moved.total / self.floor.total

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values, with enums by their values."""
        moved = self.moved and {
            buffer.value: {"read": self.moved.read[buffer], "written": self.moved.written[buffer]} for buffer in Buffer
        }
        request = dataclasses.asdict(self.request) | {
            "cache": self.request.cache.value,
            "filled": self.request.positions,
            "page_size": self.request.pool.page_size,
            "pages": self.request.pool.pages,
        }
        whole = dataclasses.asdict(dataclasses.replace(self, moved=None))
        return whole | {"request": request, "moved": moved, "ratio": self.ratio}


def check_heads(model: ModelConfig, target: Target) -> None:
    """Raises UserError if a model is not evenly divisible by the devices of a target.

    A decoder shards the heads, the feed-forward width and the vocabulary over all devices.
    """
    devices = len(target.devices)
    sizes = {
        "num_heads": model.num_heads,
        "num_kv_heads": model.kv_heads,
        "mlp_width": model.mlp_width,
        "vocab_size": model.vocab_size,
    }

    for name, size in sizes.items():
        if size % devices:
            raise UserError(
                f"a decoder divides the heads of a model among its devices, and the {devices} of {target.name} do not "
                f"divide model.{name}={size}; choose a topology with fewer"
            )


def plan_decode(model: ModelConfig, compute: ComputeConfig, request: DecodeRequest, target: Target) -> DecodePlan:
    """Returns the plan of a tick, from the program that the engine runs, compiled for a target.

    Args:
      model: the model.
      compute: the computation of the model.
      request: the size of the engine.
      target: the devices.

    Raises:
      UserError: the model does not support the request, or is not evenly divisible by the devices.
    """
    request.check(model)
    check_heads(model, target)

    # A tick is bound by reading weights, so the weights are divided, not the slots.
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=len(target.devices)), target.devices)
    network = LoopLM(model, compute)
    with use_mesh(mesh):
        dtype = compute_dtype(compute)
    params, slots = abstract_params(model, dtype, mesh), abstract_slots(network, request, dtype, mesh)

    started = time.perf_counter()
    program, memory = _compile(network, params, slots, mesh, target)
    seconds = time.perf_counter() - started

    # The floor depends on shapes alone; what is moved and sent is counted in the compiled program.
    floor, moved, sent = decode_floor(params, model, request, devices=mesh.devices.size), None, 0
    if program is not None:
        parsed = parse(program.as_text() or "")
        use = _cache_use(slots, request, devices=mesh.devices.size)
        moved = program_traffic(parsed, _holds(model), use)
        sent = sum(each.bytes for each in collectives(parsed, mesh.devices.size))
    return DecodePlan(
        target=target.name,
        devices=mesh.devices.size,
        dtype=str(dtype),
        loops=model.loops,
        request=request,
        fits=program is not None and (memory.capacity is None or memory.total <= memory.capacity),
        memory=memory,
        moved=moved,
        floor=floor,
        sent=sent,
        reading=request.capacity * bytes_per_prompt_token(model, request.cache, dtype, devices=mesh.devices.size),
        timing=None
        if moved is None
        else decode_timing(
            target,
            moved=moved.total,
            floor=floor.total,
            sent=sent,
            slots=request.slots,
            loops=model.loops,
            loops_mean=request.loops_mean,
        ),
        compile_seconds=seconds,
    )


def abstract_params(model: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> Params:
    """Returns shapes and shardings of the parameters of a decoder, in the dtype of the matrix products."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
        abstract_arrays(boxed_shapes(model), mesh),
    )


def decode_floor(params: Params, model: ModelConfig, request: DecodeRequest, *, devices: int) -> Floor:
    """Returns the bytes that a tick must move on each of `devices` devices with these abstract parameters."""
    parameters = shard_bytes(params)
    # An embedding that is not also the head is only looked up, one row for each slot.
    embedding = params["embedding"]
    if not model.tied_head:
        rows = request.slots * model.width * embedding.dtype.itemsize
        parameters += rows // devices - shard_bytes(embedding)

    # A tick reads one plane, whatever the strategy: a position takes as many bytes as in a cache with one plane.
    position = bytes_per_token(model, CacheStrategy.LAST, loops=1, dtype=embedding.dtype) // devices
    return Floor(
        parameters=parameters,
        cache_read=request.slots * request.positions * position,
        cache_written=request.slots * position,
    )


def _cache_use(slots: Slots, request: DecodeRequest, *, devices: int) -> CacheUse:
    """Returns the bytes of the cache that attention in one layer uses."""
    keys = slots.cache.planes.core.keys
    position = 2 * math.prod(keys.shape[4:]) * keys.dtype.itemsize // devices  # in one layer, including unused lanes
    return CacheUse(slots=request.slots, read=request.positions * position, written=position)


def abstract_slots(model: LoopLM, request: DecodeRequest | EngineConfig, dtype: jnp.dtype, mesh: Mesh) -> Slots:
    """Returns shapes and shardings of the slots."""

    def make() -> Slots:
        return empty_slots(
            model,
            request.cache,
            request.pool,
            rows=request.slots,
            loops=model.config.loops,
            cache_dtype=dtype,
            policies=PolicyTable.empty(request.slots),
        )

    with use_mesh(mesh):
        shapes = jax.eval_shape(make)

    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )


def _compile(
    model: LoopLM, params: Params, slots: Slots, mesh: Mesh, target: Target
) -> tuple[jax.stages.Compiled | None, DecodeMemory]:
    """Returns the program and its memory, or None and the memory that it would need if it does not fit."""
    parameters, cache = shard_bytes(params), shard_bytes(slots.cache.planes)
    memory = DecodeMemory(parameters=parameters, cache=cache, temporaries=0, other=0, capacity=target.capacity)

    with use_mesh(mesh):
        program = compile_program(
            lambda: run_ticks.lower(model, params, slots, loops=model.config.loops),
            f"a tick for {target.name}",
            "change --slots, --capacity or --page-size, or choose another --topology",
        )
    # The compiler reports the total that it would need; what is not parameters or cache are temporaries.
    if isinstance(program, OutOfMemory):
        temporaries = max(program.used - memory.total, 0)
        return None, dataclasses.replace(memory, temporaries=temporaries, capacity=program.limit)

    taken = ProgramBytes.of(program)
    other = taken.held + taken.code - parameters - cache
    return program, dataclasses.replace(memory, temporaries=taken.temporaries, other=other)


def _holds(model: ModelConfig) -> Callable[[str], Buffer]:
    """Returns what `program_traffic` calls to classify an argument of the tick by its name."""
    head = "embedding" if model.tied_head else "head"

    def holds(name: str) -> Buffer:
        parameter = _PARAMETER.match(name)
        if parameter:
            return Buffer.HEAD if parameter[1] == head else Buffer.WEIGHTS
        return Buffer.CACHE if name.startswith(_CACHE) else Buffer.TEMPORARY

    return holds
