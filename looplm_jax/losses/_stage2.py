"""The loss of Stage II (Eq. 5 and 6), which trains the gate to stop when another loop no longer lowers the loss.

    I_i^(t) = max(0, stop_grad(L_i^(t-1) - L_i^(t)))                          Eq. 5, the gain of a loop
    w_i^(t) = sigmoid(k (I_i^(t) - gamma))                                    1: continue, 0: stop
    L_adaptive^(t) = -mean_i [ w log(1 - lambda^(t)) + (1 - w) log lambda^(t) ]   Eq. 6
    loss = (1/T) sum_{t=2..T} L_adaptive^(t)

As printed, lambda^(t) is trained on the gain of the preceding loop, t-1 -> t: lambda^(1) has no target, and lambda^(T)
has one although no exit uses it. `GateTarget.LOOK_AHEAD` trains lambda^(t) on the gain t -> t+1, for t = 1..T-1.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from looplm_jax.config import GateTarget
from looplm_jax.losses._masking import mean_weights


@flax.struct.dataclass
class Stage2Metrics:
    """Metrics of Stage II: means over unmasked tokens, one for each of the T-1 gates that are trained."""

    continue_target: Float[Array, "gates"]
    adaptive_loss: Float[Array, "gates"]


def stage2(
    token_losses: Float[Array, "T *B"],
    gate_logits: Float[Array, "T *B"],
    *,
    k: float = 50.0,
    gamma: float = 0.005,
    mask: Float[Array, "*B"] | None = None,
    count: Float[Array, ""] | None = None,
    target: GateTarget = GateTarget.AS_PRINTED,
) -> tuple[Float[Array, ""], Stage2Metrics]:
    """Computes Eq. 5 and 6. Gradients reach only `gate_logits`.

    Args:
      token_losses: the cross-entropy of each token at each loop, in nats; T must be at least 2.
      gate_logits: the exit gate before its sigmoid.
      k: the slope of the target.
      gamma: the gain in nats at which continuing and stopping have equal weight.
      mask: 1 for tokens that count, 0 for others; by default all count.
      count: the number of tokens by which sums are divided, for those of a microbatch; by default the number of
        unmasked ones.
      target: the gain on which each gate is trained.

    Returns:
      The loss, and its metrics.
    """
    # The gains are targets, so no gradient passes through them.
    losses = jax.lax.stop_gradient(token_losses)
    gain = jnp.maximum(0.0, losses[:-1] - losses[1:])
    keep_looping = jax.nn.sigmoid(k * (gain - gamma))

    # Gains are those of loops 2..T. They train the gates 2..T as printed, or 1..T-1 when looking ahead.
    logits = gate_logits.astype(jnp.float32)
    logits = logits[1:] if target is GateTarget.AS_PRINTED else logits[:-1]

    per_token = -(keep_looping * jax.nn.log_sigmoid(-logits) + (1.0 - keep_looping) * jax.nn.log_sigmoid(logits))

    weights = mean_weights(mask, count, logits.shape[1:])[None]
    over_tokens = tuple(range(1, logits.ndim))
    adaptive = jnp.sum(per_token * weights, axis=over_tokens)
    metrics = Stage2Metrics(continue_target=jnp.sum(keep_looping * weights, axis=over_tokens), adaptive_loss=adaptive)

    # Eq. 6 divides by T, although there are T-1 terms.
    return jnp.sum(adaptive) / gate_logits.shape[0], metrics
