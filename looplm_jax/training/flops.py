"""Floating-point operations of the model, by formula. XLA's cost analysis counts the body of a scan only once."""

from looplm_jax.config import ModelConfig, Objective


def forward_flops_per_token(config: ModelConfig, *, loops: int, sequence_length: int) -> int:
    """Returns the operations of one token's forward pass through all loops, including the head of each loop.

    Each multiply-add of a matrix product counts as two operations. Attention counts the causal half, `(S + 1) / 2` keys
    per query. Norms, rotary embedding, softmax and the embedding lookup are excluded, as is usual for model FLOP/s.

    Args:
      config: the model.
      loops: the number of loops.
      sequence_length: the number of positions of a sequence.
    """
    inner, kv_inner = config.num_heads * config.head_width, config.kv_heads * config.head_width
    # Multiply-adds per token: query and output, keys and values; then the three matrices of the feed-forward layer.
    projections = config.width * (2 * inner + 2 * kv_inner) + 3 * config.width * config.mlp_width
    attention = inner * (sequence_length + 1)  # multiply-adds of scores and mixing, each over (S + 1) / 2 keys
    layer = 2 * projections + 2 * attention

    injection = 2 * 2 * config.width**2 if config.injection.value == "linear" else 0
    # The head and the exit gate.
    readout = 2 * config.width * config.vocab_size + 2 * config.width

    per_loop = (config.num_layers + config.coda_layers) * layer + injection + readout
    return config.prelude_layers * layer + loops * per_loop


def train_flops_per_token(
    config: ModelConfig, *, loops: int, sequence_length: int, objective: Objective = Objective.EXPECTED_LOSS
) -> int:
    """Returns the operations of one token's train step.

    The backward pass costs twice the forward pass, or nothing if only the gate is trained. `last_loss` evaluates the
    head only after the last loop. Recomputation under rematerialization is not counted: these are operations of the
    model, not of the hardware.

    Args:
      config: the model.
      loops: the number of loops.
      sequence_length: the number of positions of a sequence.
      objective: the objective of the stage.
    """
    forward = forward_flops_per_token(config, loops=loops, sequence_length=sequence_length)
    if objective is Objective.GATE:
        return forward
    # Earlier loops have no head.
    if objective is Objective.LAST_LOSS:
        forward -= (loops - 1) * 2 * config.width * config.vocab_size
    return 3 * forward
