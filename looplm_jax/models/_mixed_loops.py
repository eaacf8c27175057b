"""Looping tokens until their gates halt them, and mixing their states: Adaptive Computation Time (1603.08983)."""

from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from looplm_jax.config import Remat
from looplm_jax.halting import act, weighted_state
from looplm_jax.models._looplm import LoopLM, LoopOutput, check_loops, for_calls


@flax.struct.dataclass
class MixedOutput:
    """The state that the head reads for each token, with the halting weights of `halting.act` and its two costs."""

    hidden: Float[Array, "B S D"]
    weights: Float[Array, "T B S"]
    remainders: Float[Array, "B S"]
    updates: Int[Array, "B S"]


def mixed_loops(
    model: LoopLM,
    variables: dict[str, Any],
    tokens: Int[Array, "B S"],
    *,
    loops: int,
    epsilon: float = 0.01,
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    noise_seeds: UInt32[Array, "B S"] | None = None,
) -> MixedOutput:
    """Returns the mix of the states of all loops, read out once, as the Universal Transformer does (1807.03819).

    The sigmoid of the gate of loop t is the halting probability `p_t`. A token halts after the loop at which the sum of
    its probabilities exceeds `1 - epsilon`, or after the last one. Its state is copied in all later loops, where other
    tokens still attend to it. The mix has the norm of the state, coda and head of a single state.

    Args:
      model: the model, which needs a gate. As published, it reads the input of the loop (`gate=before`).
      variables: its parameters, and gathered copies if there are any.
      tokens: the token ids.
      loops: the largest number of loops, T.
      epsilon: the probability at the end that is not waited for.
      positions: the position of each token in its document.
      segment_ids: the document of each token.
      noise_seeds: the seed of the noise from which the state of each token starts, as for `LoopLM`.

    Raises:
      UserError: the model cannot run that many loops.
    """
    check_loops(model.config, loops)
    model = for_calls(model, loops)
    context, embedded, _ = cast(
        Any, model.apply(variables, tokens, positions=positions, segment_ids=segment_ids, method="begin")
    )
    start: Any = model.apply(variables, embedded, noise_seeds, method="initial_state")

    def loop(carry: tuple[Array, Array], done: Int[Array, ""]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        state, total = carry
        output, _, _ = cast(
            tuple[LoopOutput, Any, Any], model.apply(variables, state, embedded, context, done, method="loop_step")
        )
        probabilities = jax.nn.sigmoid(output.gate_logits)

        running = total <= 1.0 - epsilon
        state = jnp.where(running[..., None], output.state, state)
        # Which tokens run is a constant.
        return (state, total + jax.lax.stop_gradient(probabilities)), (state, probabilities)

    # Inside a scan, XLA cannot merge the recomputation with the original, so it needs no barrier (`prevent_cse`).
    if model.compute.remat is Remat.LOOP:
        loop = jax.checkpoint(loop, prevent_cse=False)
    nothing = jnp.zeros(tokens.shape, jnp.float32)
    _, (states, probabilities) = jax.lax.scan(loop, (start, nothing), jnp.arange(loops, dtype=jnp.int32))

    halting = act(probabilities, epsilon=epsilon)
    hidden, _ = cast(Any, model.apply(variables, weighted_state(halting.weights, states), context, method="read_out"))
    return MixedOutput(hidden=hidden, weights=halting.weights, remainders=halting.remainders, updates=halting.updates)
