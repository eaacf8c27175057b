"""Floating-point operations of the model, by formula: compiled programs count the body of a scan once."""

from looplm_jax.config import ModelConfig, Objective


def forward_flops_per_token(config: ModelConfig, *, loops: int, sequence_length: int) -> int:
    """Operations of one token's forward pass through all loops and the head of each: two for each multiply-add of a
    matrix product.

    Attention counts the causal half, `(S + 1) / 2` keys a query. Norms, rotary embedding, softmax and the embedding
    lookup are left out, as is usual for model FLOP/s.
    """
    inner, kv_inner = config.num_heads * config.head_width, config.kv_heads * config.head_width
    projections = config.width * (2 * inner + 2 * kv_inner) + 3 * config.width * config.mlp_width
    attention = inner * (sequence_length + 1)  # scores and mixing, each over (S + 1) / 2 keys
    layer = 2 * projections + 2 * attention
    injection = 2 * 2 * config.width**2 if config.injection.value == "linear" else 0
    readout = 2 * config.width * config.vocab_size + 2 * config.width
    per_loop = (config.num_layers + config.coda_layers) * layer + injection + readout
    return config.prelude_layers * layer + loops * per_loop


def train_flops_per_token(
    config: ModelConfig, *, loops: int, sequence_length: int, objective: Objective = Objective.EXPECTED_LOSS
) -> int:
    """Returns the operations of one token's train step: the backward pass costs twice the forward pass, or nothing
    where only the gate learns. The loss after the last loop has one head.

    What rematerialization computes again is not counted: these are the model's operations, not the hardware's.
    """
    forward = forward_flops_per_token(config, loops=loops, sequence_length=sequence_length)
    if objective is Objective.GATE:
        return forward
    if objective is Objective.LAST_LOSS:
        forward -= (loops - 1) * 2 * config.width * config.vocab_size
    return 3 * forward
