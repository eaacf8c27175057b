"""The exit loop of tokens for which all loops were computed, as for prompts and in evaluation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from looplm_jax.halting.policies import ExitPolicy
from looplm_jax.halting.policy_table import PolicyTable
from looplm_jax.halting.signals import LoopMemory, Needs

Head = Callable[[Array], Array]  # states [*B, D] of one loop to logits [*B, V]


def exit_loops(
    policy: ExitPolicy | PolicyTable,
    hidden: Float[Array, "T *B D"],
    gate_logits: Float[Array, "T *B"],
    logits: Head | Float[Array, "T *B V"],
) -> Int[Array, "*B"]:
    """Returns the loop at which each token exits, in 1..T. Tokens that have not exited earlier exit at T.

    Args:
      policy: a policy for all tokens, or a table with one per token.
      hidden: the states of every loop.
      gate_logits: the exit gates of every loop.
      logits: the predictions of every loop, or a head that computes those of one loop, `[*B, D]` to `[*B, V]`. The head
        is called only for policies that read predictions, and for one loop at a time.
    """

    def predict(loop: Int[Array, ""]) -> Float[Array, "*B V"] | None:
        if Needs.LOGITS not in policy.needs:
            return None
        return logits(hidden[loop]) if callable(logits) else logits[loop]

    def after_loop(memory: LoopMemory, loop: Int[Array, ""]) -> tuple[LoopMemory, Array]:
        signals = memory.observe(gate_logits[loop], hidden[loop], predict(loop))
        return signals.memory(), policy.exits(signals)

    loops = jnp.arange(hidden.shape[0])
    # The memory needs the shapes of the states and predictions of one loop; nothing is computed here.
    of_one_loop = jax.eval_shape(lambda loop: (hidden[loop], predict(loop)), loops[0])
    _, leaves = jax.lax.scan(after_loop, LoopMemory.before_loops(policy.needs, *of_one_loop), loops)

    return jnp.argmax(leaves.at[-1].set(True), axis=0).astype(jnp.int32) + 1
