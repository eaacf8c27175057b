"""The architecture of a looped language model, and its choices."""

import dataclasses
import enum
import math

from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import require as _require

# Choices


class NormPlacement(enum.Enum):
    """The norms of a residual branch `f` of a layer.

    SANDWICH: `x + N(f(N x))` (Ouro). PRE: `x + f(N x)`. POST: `N(x + f x)` (Universal Transformer). OUTER:
    `N(x + f(N x))` (Huginn).
    """

    SANDWICH = "sandwich"
    PRE = "pre"
    POST = "post"
    OUTER = "outer"


class StateNorm(enum.Enum):
    """When the state is normalized: after every loop (Ouro), or only for the coda, the gate and the head (Huginn)."""

    EVERY_LOOP = "every_loop"
    READOUT = "readout"


class Residual(enum.Enum):
    """The weights of the sum of a layer of the shared stack, `skip * x + branch * f(x)`.

    PLAIN: 1 and 1. PER_LOOP: 1 and `1 / (T sqrt(L))` (arXiv 2606.18524). DEEP_LOOP: `sqrt(2 T L)` and 1, with initial
    matrices of values, outputs and the feed-forward layer multiplied by `1 / sqrt(8 T L)` (arXiv 2607.13491). T is
    `loops` of the configuration, whatever the number of loops of a call.
    """

    PLAIN = "plain"
    PER_LOOP = "per_loop"
    DEEP_LOOP = "deep_loop"


class Injection(enum.Enum):
    """Injection of the embedded input `e` into every loop.

    NONE: no injection (Ouro). ADD: `h + e`. LINEAR: `W [h; e]` (Huginn). DIAGONAL: `a * h + d * (B e)` with
    `a = exp(-d exp(A))` and `d = softplus(b)`, elementwise (Parcae, arXiv 2604.12946). QUERY: every loop starts from
    `e`, and queries come from `h` (fully looped transformer, arXiv 2605.18797).
    """

    NONE = "none"
    ADD = "add"
    LINEAR = "linear"
    DIAGONAL = "diagonal"
    QUERY = "query"


class InitialState(enum.Enum):
    """The state before loop 1.

    EMBEDDED: the embedded input, or zero if an injection adds the input in every loop. ZERO: zero. NOISE: in training,
    a normal distribution that is cut at three standard deviations (Huginn); zero, its mean, elsewhere.
    """

    EMBEDDED = "embedded"
    ZERO = "zero"
    NOISE = "noise"


class TimeSignal(enum.Enum):
    """The signal of the number of the loop, added to the input of the shared stack.

    NONE: nothing. SINUSOID: sines and cosines of the number (Universal Transformer, arXiv 1807.03819). LEARNED: a row
    of a table with `max_loops` rows. MODULATION: not added; the fraction of a call's loops that are done, and that of
    the next one, scale the inputs of the branches of each layer and the branches (LoopFormer, arXiv 2602.11451). These
    start at zero.
    """

    NONE = "none"
    SINUSOID = "sinusoid"
    LEARNED = "learned"
    MODULATION = "modulation"


class PositionSignal(enum.Enum):
    """The signal of the order of tokens: rotary embedding in attention, or sinusoids added to every loop's input."""

    ROTARY = "rotary"
    SINUSOID = "sinusoid"


class GatePlacement(enum.Enum):
    """The state that the exit gate reads: after the loop (Ouro), or the input of the loop (ACT). NONE: no gate."""

    AFTER = "after"
    BEFORE = "before"
    NONE = "none"


class Initializer(enum.Enum):
    """The distribution of initial matrices.

    NORMAL: Normal(0, init_std). SCALED_BY_DEPTH: the same, cut at three standard deviations, with the output and up
    projections of each layer divided by `sqrt(2 (prelude_layers + T L + coda_layers))` (Huginn).
    """

    NORMAL = "normal"
    SCALED_BY_DEPTH = "scaled_by_depth"


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
    # Loops, and what comes around them. The defaults of all fields from here on are Ouro's.
    loops: int = _field("loops that the model is trained for, T; a call may run more or fewer", 4)
    prelude_layers: int = _field("layers before the loops, applied once", 0)
    coda_layers: int = _field("layers between every loop's state and its head", 0)
    injection: Injection = _field("how the embedded input enters every loop", Injection.NONE)
    injection_norm: bool = _field("normalize the embedded input before it is injected", False)
    initial_state: InitialState = _field("state before loop 1", InitialState.EMBEDDED)
    state_std: float = _field("initial_state=noise: standard deviation", 0.6324555320336759)
    state_norm: StateNorm = _field("when the state is normalized", StateNorm.EVERY_LOOP)
    shared_readout_norm: bool = _field("the norm after the coda has the weights of the norm of the state", False)
    gate: GatePlacement = _field("what the exit gate reads", GatePlacement.AFTER)
    gate_bias: float = _field("initial bias of the exit gate; negative: later exits", 0.0)
    # What a loop receives beside the state.
    time_signal: TimeSignal = _field("what a loop receives about its number", TimeSignal.NONE)
    max_loops: int = _field("time_signal=learned: most loops of a call; 0 means as many as loops", 0)
    position_signal: PositionSignal = _field("how attention learns the order of tokens", PositionSignal.ROTARY)
    rope_theta: float = _field("base of the rotary embedding", 1e6)
    # Details of a layer.
    norm_placement: NormPlacement = _field("norms of a layer", NormPlacement.SANDWICH)
    second_norm_init: float = _field("norm_placement=sandwich: initial weight of the norms after the branches", 1.0)
    residual: Residual = _field("weights of the sum of a layer of the shared stack", Residual.PLAIN)
    qk_bias: bool = _field("biases of queries and keys", False)
    norm_eps: float = _field("epsilon of RMSNorm", 1e-6)
    # Embedding, head and initial values.
    tied_head: bool = _field("use the embedding as the head", False)
    embedding_scale: float = _field("factor of the embedded tokens; a tied head is not scaled", 1.0)
    max_positions: int = _field("longest sequence the model accepts", 65536)
    initializer: Initializer = _field("distribution of the initial matrices", Initializer.NORMAL)
    init_std: float = _field("standard deviation of the initial matrices", 0.02)

    def __post_init__(self) -> None:
        _check_kinds(self, "model")

        # Sizes.
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "max_positions"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("num_kv_heads", "head_dim", "prelude_layers", "coda_layers", "max_loops", "state_std"):
            _require(getattr(self, name) >= 0, f"model.{name} must not be negative, not {getattr(self, name)}")
        _require(self.loops >= 1, f"model.loops must be at least 1, not {self.loops}")

        for name in ("rope_theta", "norm_eps", "init_std", "embedding_scale", "second_norm_init"):
            _require(getattr(self, name) > 0, f"model.{name} must be positive, not {getattr(self, name)}")
        _require(
            self.head_dim > 0 or self.width % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.width={self.width}; "
            "change one of them, or set model.head_dim",
        )

        # The rotary embedding rotates pairs of entries.
        _require(
            self.position_signal is not PositionSignal.ROTARY or self.head_width % 2 == 0,
            f"model.head_dim must be even for rotary embedding, not {self.head_width}",
        )
        # Grouped-query attention: as many query heads for each key/value head.
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.kv_heads} does not divide model.num_heads={self.num_heads}",
        )

        self._check_loop()
        self._check_layer()

    def _check_loop(self) -> None:
        """Raises UserError for options of the loop that have no meaning together."""
        injected = self.injection is not Injection.NONE
        _require(
            injected or not self.injection_norm,
            "model.injection_norm needs an injected input; set model.injection, or model.injection_norm=false",
        )
        # Without the embedded input, a loop would not see the tokens.
        _require(
            injected or self.initial_state is InitialState.EMBEDDED,
            f"model.initial_state={self.initial_state.value} without an injection hides the tokens from all loops; "
            "set model.injection",
        )
        _require(
            self.injection is not Injection.QUERY or self.initial_state is InitialState.EMBEDDED,
            f"model.initial_state={self.initial_state.value} is not read with model.injection=query, "
            "whose first loop reads the input alone; set model.initial_state=embedded",
        )
        _require(
            self.coda_layers > 0 or not self.shared_readout_norm,
            "model.shared_readout_norm needs a coda; set model.coda_layers, or model.shared_readout_norm=false",
        )

        # Sines and cosines are pairs of entries.
        signals = self.time_signal is TimeSignal.SINUSOID or self.position_signal is PositionSignal.SINUSOID
        _require(not signals or self.width % 2 == 0, f"model.width must be even for sinusoids, not {self.width}")
        # The signal is added in every loop, so the layers before the loops would not know the order of the tokens.
        _require(
            self.position_signal is PositionSignal.ROTARY or self.prelude_layers == 0,
            f"model.position_signal={self.position_signal.value} does not reach the prelude; "
            "set model.prelude_layers=0, or model.position_signal=rotary",
        )
        learned = self.time_signal is TimeSignal.LEARNED
        _require(
            self.max_loops == 0 or learned,
            f"model.max_loops={self.max_loops} needs model.time_signal=learned, not {self.time_signal.value}",
        )
        _require(
            self.max_loops == 0 or self.max_loops >= self.loops,
            f"model.max_loops={self.max_loops} is less than model.loops={self.loops}",
        )
        _require(
            self.gate_bias == 0 or self.gate is not GatePlacement.NONE,
            f"model.gate_bias={self.gate_bias} needs a gate; set model.gate=after, or model.gate_bias=0",
        )

    def _check_layer(self) -> None:
        """Raises UserError for options of a layer that have no meaning together."""
        placement = self.norm_placement
        _require(
            placement is NormPlacement.SANDWICH or self.second_norm_init == 1,
            f"model.second_norm_init={self.second_norm_init} needs model.norm_placement=sandwich, "
            f"not {placement.value}",
        )
        _require(
            placement is NormPlacement.OUTER or self.residual is not Residual.DEEP_LOOP,
            f"model.residual=deep_loop needs model.norm_placement=outer, not {placement.value}",
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

    @property
    def time_rows(self) -> int:
        """The rows of the table of a learned time signal."""
        return self.max_loops or self.loops

    @property
    def deeper_loops(self) -> int:
        """Twice the trained depth, which shows whether more loops still help; fewer if the model cannot run them."""
        return min(2 * self.loops, self.time_rows if self.time_signal is TimeSignal.LEARNED else 2 * self.loops)

    @property
    def residual_weights(self) -> tuple[float, float]:
        """The factors of state and branch in the sums of the shared stack."""
        match self.residual:
            case Residual.PLAIN:
                return 1.0, 1.0
            case Residual.PER_LOOP:
                return 1.0, 1 / (self.loops * math.sqrt(self.num_layers))
            case Residual.DEEP_LOOP:
                return math.sqrt(2 * self.loops * self.num_layers), 1.0

    @property
    def unrolled_depth(self) -> int:
        """The layers that a token passes in T loops, with prelude and coda once."""
        return self.prelude_layers + self.loops * self.num_layers + self.coda_layers
