"""The size of an engine, and the counters of its work."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from looplm_jax.errors import UserError
from looplm_jax.inference._cache_layout import PoolSize
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._field_checks import truth, whole_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The size of an engine. It determines memory and speed, and, except for `cache`, no result.

    Every field is a static size of the compiled programs: use one engine, with one configuration, for all requests.

        EngineConfig(slots=16, capacity=4096, cache=CacheStrategy.LAST)

    Bytes of the cache are `pages * page_size * bytes_per_token(...)`, `Engine.cache_bytes` in all. Out of memory: use
    fewer `slots` or `pages`, a smaller `capacity`, or another `cache`. Raises UserError for an invalid size.
    """

    slots: int = 8  # requests that run at the same time
    capacity: int = 2048  # maximum tokens of a request, prompt and text together; at most the positions of the model
    page_size: int = 128  # positions per page of the cache; at most `capacity`
    pages: int | None = None  # pages that all slots share; None: enough for `capacity` tokens in every slot
    loops: int | None = None  # maximum loops per token; None: the trained depth
    cache: CacheStrategy = CacheStrategy.FULL
    cache_dtype: DTypeLike | None = None  # None: the dtype of the matrix products
    chunk: int = 256  # prompt tokens that are prefilled between two ticks, approximately
    ticks: int = 1  # passes of the stack per step; their results are fetched together
    queue: int = 1024  # maximum requests in the queue
    previews: bool = False  # whether to return the most probable token of every loop
    unroll: bool | None = None  # a copy of the weights with one array per layer; None: on a CPU, where it is faster

    def __post_init__(self) -> None:
        for name in ("slots", "capacity", "page_size", "chunk", "ticks", "queue"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        for name in ("pages", "loops"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        truth("previews", self.previews)
        if self.unroll is not None:
            truth("unroll", self.unroll)
        if not isinstance(self.cache, CacheStrategy):
            raise UserError(f"cache must be a CacheStrategy, such as CacheStrategy.LAST, not {self.cache!r}")
        if self.cache_dtype is not None:
            _check_dtype(self.cache_dtype)

    @property
    def pool(self) -> PoolSize:
        """The pages of the cache."""
        return PoolSize.of(slots=self.slots, capacity=self.capacity, page_size=self.page_size, pages=self.pages)

    def fitted(self, positions: int) -> "EngineConfig":
        """Returns the same configuration, with a capacity of at most the positions of a model."""
        return dataclasses.replace(self, capacity=min(self.capacity, positions))


def _check_dtype(dtype: DTypeLike) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise UserError(f"cache_dtype must be a floating-point type, such as jnp.bfloat16, not {dtype!r}")


@dataclasses.dataclass
class EngineStats:
    """The work of an engine so far."""

    ticks: int = 0  # passes of the stack
    loops: int = 0  # loops of tokens in these passes, at most ticks times slots
    tokens: int = 0  # emitted new tokens
    prompt_tokens: int = 0
    seconds_a_tick: float = 0.0  # moving mean

    def record_tick(self, seconds: float) -> None:
        """Records the time of one tick."""
        self.seconds_a_tick = seconds if not self.seconds_a_tick else 0.9 * self.seconds_a_tick + 0.1 * seconds
