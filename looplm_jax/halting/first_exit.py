"""The exit loop of tokens whose loops have all been run: prompts, and evaluation."""

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
    """The loop that each token leaves at, in 1..T; what has not left before leaves at T.

    Args:
      policy: one for all tokens, or a table with one for each.
      hidden: states of every loop.
      gate_logits: exit gates of every loop.
      logits: predictions of every loop, or the head that makes those of one loop, `[*B, D]` to `[*B, V]`. The head is
        called only for policies that read predictions, and for one loop at a time.
    """

    def predict(loop: Int[Array, ""]) -> Float[Array, "*B V"] | None:
        if Needs.LOGITS not in policy.needs:
            return None
        return logits(hidden[loop]) if callable(logits) else logits[loop]

    def after_loop(memory: LoopMemory, loop: Int[Array, ""]) -> tuple[LoopMemory, Array]:
        signals = memory.observe(gate_logits[loop], hidden[loop], predict(loop))
        return signals.memory(), policy.exits(signals)

    loops = jnp.arange(hidden.shape[0])
    of_one_loop = jax.eval_shape(lambda loop: (hidden[loop], predict(loop)), loops[0])
    _, leaves = jax.lax.scan(after_loop, LoopMemory.before_loops(policy.needs, *of_one_loop), loops)
    return jnp.argmax(leaves.at[-1].set(True), axis=0).astype(jnp.int32) + 1
