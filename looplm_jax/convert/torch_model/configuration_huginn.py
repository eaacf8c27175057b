"""The configuration of a Huginn for transformers 4.57 and 5, with the published fields. Other values are refused."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_huginn.RavenConfig",
    "AutoModelForCausalLM": "modeling_huginn.RavenForCausalLM",
}
# Fields that change what the model computes: only these values are supported.
_ONLY = {
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "bias": False,
    "qk_bias": True,
    "tie_embeddings": True,
    "test_time_noise": 0,
}
# Fields that follow from others.
_DERIVED = ("head_dim", "num_key_value_heads", "n_layers", "padded_vocab_size")


class RavenConfig(PretrainedConfig):
    """The configuration of a model, under the names of Huginn's `config.json`. The defaults are those of Huginn-0125.

    Args:
        n_embd: model width, D.
        n_heads: attention heads, H.
        intermediate_size: feed-forward width.
        n_layers_in_prelude: layers before the loops.
        n_layers_in_recurrent_block: layers in the shared stack, L.
        n_layers_in_coda: layers after the loops.
        mean_recurrence: loops, T; a call may ask for more or fewer.
        mean_backprop_depth: for training with the published code; it has no effect here, nor has `sampling_scheme`.
        block_size: longest sequence that the model is trained for.
        vocab_size: number of tokens, V.
        norm_eps: epsilon of RMSNorm.
        rope_base: base of the rotary embedding.
        use_cache: return keys and values by default, except in training.

    Raises:
        ValueError: a value is not supported; the one-line message names the field.
    """

    model_type = "huginn_raven"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "hidden_states", "latent_states"]
    # Names that transformers reads -> published names.
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "block_size",
    }

    def __init__(
        self,
        *,
        n_embd: int = 5280,
        n_heads: int = 55,
        intermediate_size: int = 17920,
        n_layers_in_prelude: int = 2,
        n_layers_in_recurrent_block: int = 4,
        n_layers_in_coda: int = 2,
        mean_recurrence: int = 32,
        mean_backprop_depth: int = 8,
        sampling_scheme: str = "poisson-lognormal-filling",
        block_size: int = 4096,
        vocab_size: int = 65536,
        norm_eps: float = 1e-6,
        rope_base: float = 50_000.0,
        use_cache: bool = True,
        bos_token_id: int | None = 65504,
        eos_token_id: int | list[int] | None = 65505,
        auto_map: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:

        self.n_embd = n_embd
        self.n_heads = n_heads
        self.intermediate_size = intermediate_size
        self.n_layers_in_prelude = n_layers_in_prelude
        self.n_layers_in_recurrent_block = n_layers_in_recurrent_block
        self.n_layers_in_coda = n_layers_in_coda
        self.mean_recurrence = mean_recurrence
        self.mean_backprop_depth = mean_backprop_depth
        self.sampling_scheme = sampling_scheme
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.norm_eps = norm_eps
        self.rope_base = rope_base
        self.use_cache = use_cache
        # A saved folder names the classes that load it.
        self.auto_map = {**_AUTO_MAP, **(auto_map or {})}

        for name, only in _ONLY.items():
            setattr(self, name, kwargs.pop(name, only))
        derived = {name: kwargs.pop(name) for name in _DERIVED if name in kwargs}
        kwargs.setdefault("tie_word_embeddings", True)
        kwargs.update(bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        super().__init__(**kwargs)

        self.check()
        for name, value in derived.items():
            _require(value == getattr(self, name), name, value, f"{getattr(self, name)}, as other fields give")

    @property
    def head_dim(self) -> int:
        """Width of a head, Dh."""
        return self.n_embd // self.n_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads."""
        return self.n_heads

    @property
    def n_layers(self) -> int:
        """Layers of all stacks, each counted once."""
        return self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.vocab_size

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, with those that follow from others."""
        return {**super().to_dict(), **{name: getattr(self, name) for name in _DERIVED}}

    def check(self) -> None:
        """Raises ValueError for unsupported values. The model calls it again, because fields may have changed since."""
        for name, only in {**_ONLY, "tie_word_embeddings": True}.items():
            _require(getattr(self, name) == only, name, getattr(self, name), repr(only))
        _require(self.n_embd % self.n_heads == 0, "n_heads", self.n_heads, f"a divisor of n_embd={self.n_embd}")
        _require(self.head_dim % 2 == 0, "n_heads", self.n_heads, "such that n_embd / n_heads is even, to be rotated")
        _require(self.mean_recurrence >= 1, "mean_recurrence", self.mean_recurrence, "at least 1")


def _require(condition: bool, field: str, value: Any, wanted: str) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"config field {field} must be {wanted}, not {value!r}")


RavenConfig.register_for_auto_class()  # saved folders get a copy of this file
