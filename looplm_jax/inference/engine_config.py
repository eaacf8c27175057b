"""The size of an engine."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from looplm_jax.errors import UserError
from looplm_jax.inference.field_checks import truth, whole_number
from looplm_jax.inference.kv_cache import CacheStrategy
from looplm_jax.inference.page_pool import PoolSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The size of an engine. Nothing here changes what a request is answered, save `cache`.

    Raises UserError for a size that cannot be.
    """

    slots: int = 8  # requests under way at one time
    capacity: int = 2048  # tokens of a request, prompt and text together; no more than the model has positions
    page_size: int = 128  # positions of a page of the cache; no more than `capacity`
    pages: int | None = None  # pages that all slots share; None: as many as all need for requests of `capacity` tokens
    loops: int | None = None  # the most loops of a token; None: those the model is meant for
    cache: CacheStrategy = CacheStrategy.FULL
    cache_dtype: DTypeLike | None = None  # None: the dtype of the matrix products
    chunk: int = 256  # tokens of prompts that are read between two ticks, about
    ticks: int = 1  # passes of the stack between two looks at what came of them
    queue: int = 1024  # requests that may wait
    previews: bool = False  # whether every loop's likeliest token is wanted
    unroll: bool | None = None  # a copy of the weights, an array for each layer; None: on a CPU, where it is faster

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
        """Pages of the cache."""
        return PoolSize.of(slots=self.slots, capacity=self.capacity, page_size=self.page_size, pages=self.pages)

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
