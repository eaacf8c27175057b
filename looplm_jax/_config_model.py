"""The architecture of a looped language model, and its choices."""

import dataclasses
import enum

from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import require as _require

# Choices


class NormPlacement(enum.Enum):
    """The placement of norms in a layer: before each branch, or before and after it (Ouro)."""

    SANDWICH = "sandwich"
    PRE = "pre"


class Injection(enum.Enum):
    """Injection of the embedded input `e` into every loop: none (Ouro), `h + e`, or `W [h; e]` (Huginn)."""

    NONE = "none"
    ADD = "add"
    LINEAR = "linear"


# The model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a looped language model: a prelude, a core stack applied `loops` times, and a coda."""

    # Sizes of the stack.
    vocab_size: int = _field("tokens in the vocabulary, V")
    width: int = _field("model width, D")
    mlp_width: int = _field("feed-forward width, F")
    num_layers: int = _field("layers in the shared stack, L")
    num_heads: int = _field("query heads, H")
    num_kv_heads: int = _field("key/value heads, K; 0 means as many as query heads", 0)
    head_dim: int = _field("width of a head, Dh; 0 means width / num_heads", 0)
    # Loops, and what comes around them.
    loops: int = _field("loops that the model is trained for, T; a call may run more or fewer", 4)
    prelude_layers: int = _field("layers before the loops, applied once", 0)
    coda_layers: int = _field("layers between every loop's state and its head", 0)
    injection: Injection = _field("how the embedded input enters every loop", Injection.NONE)
    # Details of a layer. The defaults are Ouro's.
    norm_placement: NormPlacement = _field("norms of a layer", NormPlacement.SANDWICH)
    tied_head: bool = _field("use the embedding as the head", False)
    rope_theta: float = _field("base of the rotary embedding", 1e6)
    norm_eps: float = _field("epsilon of RMSNorm", 1e-6)
    max_positions: int = _field("longest sequence the model accepts", 65536)
    init_std: float = _field("standard deviation of the initial matrices", 0.02)

    def __post_init__(self) -> None:
        _check_kinds(self, "model")

        # Sizes.
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "max_positions"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("num_kv_heads", "head_dim", "prelude_layers", "coda_layers"):
            _require(getattr(self, name) >= 0, f"model.{name} must not be negative, not {getattr(self, name)}")
        _require(self.loops >= 1, f"model.loops must be at least 1, not {self.loops}")

        for name in ("rope_theta", "norm_eps", "init_std"):
            _require(getattr(self, name) > 0, f"model.{name} must be positive, not {getattr(self, name)}")
        _require(
            self.head_dim > 0 or self.width % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.width={self.width}; "
            "change one of them, or set model.head_dim",
        )

        # The rotary embedding rotates pairs of entries.
        _require(self.head_width % 2 == 0, f"model.head_dim must be even for rotary embedding, not {self.head_width}")
        # Grouped-query attention: as many query heads for each key/value head.
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.kv_heads} does not divide model.num_heads={self.num_heads}",
        )

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads, K."""
        # 0 stands for a default that depends on other fields.
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """The width of a head, Dh."""
        return self.head_dim or self.width // self.num_heads
