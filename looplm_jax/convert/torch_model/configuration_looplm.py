"""The configuration of a LoopLM for transformers 4.57 and 5, with Ouro's fields. Unsupported values are refused."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_looplm.OuroConfig",
    "AutoModel": "modeling_looplm.OuroModel",
    "AutoModelForCausalLM": "modeling_looplm.OuroForCausalLM",
}
# Fields that change what other kinds of models compute; those that Ouro lacks may be absent.
_ONLY = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


class OuroConfig(PretrainedConfig):
    """The configuration of a model, under the names of Ouro's `config.json`. The defaults are those of Ouro-1.4B.

    Args:
        vocab_size: number of tokens, V.
        hidden_size: model width, D.
        intermediate_size: feed-forward width.
        num_hidden_layers: layers in the shared stack, L.
        num_attention_heads: query heads, H.
        num_key_value_heads: key/value heads, K; default H.
        head_dim: width of a head, Dh; default D / H.
        hidden_act: only "silu".
        max_position_embeddings: longest sequence that the model is trained for.
        initializer_range: standard deviation of the initial matrices.
        rms_norm_eps: epsilon of RMSNorm.
        use_cache: return keys and values by default, except in training.
        tie_word_embeddings: use the embedding as the head.
        rope_theta: base of the rotary embedding; default 1e6. transformers 5 may write it to `rope_parameters`.
        rope_scaling: only None or the default type.
        rope_parameters: the same, as transformers 5 writes it.
        attention_dropout: dropout on attention weights during training.
        layer_types: only "full_attention".
        use_sliding_window: only False; `sliding_window` and `max_window_layers` are kept and have no effect.
        total_ut_steps: loops, T; a call may ask for more or fewer.
        early_exit_threshold: q, in [0, 1]: a token exits at the first loop whose CDF reaches q; 1 means the last loop.
        entropy_weight: beta of the training loss (Eq. 4).

    Raises:
        ValueError: a value is not supported; the one-line message names the field.
    """

    model_type = "ouro"
    # Trainer gathers every output that is not named here; the predictions are the logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "hidden_states",
        "gate_logits",
        "exit_probabilities",
        "exit_loops",
        "loops_run",
    ]

    def __init__(
        self,
        *,
        vocab_size: int = 49152,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 65536,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        rope_theta: float = 1e6,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        attention_dropout: float = 0.0,
        layer_types: list[str] | None = None,
        use_sliding_window: bool = False,
        total_ut_steps: int = 4,
        early_exit_threshold: float = 1.0,
        entropy_weight: float = 0.05,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 0,
        auto_map: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:

        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        # transformers 4.57 has a field of its own for the base; 5 keeps it among the parameters of the rotary
        # embedding.
        self.rope_theta = (rope_parameters or rope_scaling or {}).get("rope_theta", rope_theta)
        self.attention_dropout = attention_dropout
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.use_sliding_window = use_sliding_window
        self.total_ut_steps = total_ut_steps
        self.early_exit_threshold = early_exit_threshold
        self.entropy_weight = entropy_weight
        # A saved folder names the classes that load it.
        self.auto_map = {**_AUTO_MAP, **(auto_map or {})}
        for name, rope in (("rope_scaling", rope_scaling), ("rope_parameters", rope_parameters)):
            _require_default_rope(name, rope)
        kwargs.update(tie_word_embeddings=tie_word_embeddings, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        super().__init__(**kwargs)
        # Checked last, because the constructor of transformers sets fields too.
        self.check()

    def check(self) -> None:
        """Raises ValueError for unsupported values. The model calls it again, because fields may have changed since."""
        _require_default_rope("rope_parameters", getattr(self, "rope_parameters", None))
        for name, only in _ONLY.items():
            _require(getattr(self, name, only) == only, name, getattr(self, name, only), repr(only))

        _require(set(self.layer_types) == {"full_attention"}, "layer_types", self.layer_types, "'full_attention'")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, for the rotary embedding")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")

        _require(self.total_ut_steps >= 1, "total_ut_steps", self.total_ut_steps, "at least 1")
        _require(0 <= self.early_exit_threshold <= 1, "early_exit_threshold", self.early_exit_threshold, "in [0, 1]")
        _require(self.entropy_weight >= 0, "entropy_weight", self.entropy_weight, "at least 0")


def _require_default_rope(field: str, rope: dict[str, Any] | None) -> None:
    kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
    _require(kind == "default", field, rope, "None or of type 'default'")


def _require(condition: bool, field: str, value: Any, wanted: str) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"config field {field} must be {wanted}, not {value!r}")


OuroConfig.register_for_auto_class()  # saved folders get a copy of this file
